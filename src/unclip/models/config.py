"""What describes a network: frozen, checked before anything is allocated, and a mapping as well as an object.

Knows the kinds of checks but no particular network. Called by the networks' own configurations.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

from unclip.errors import ConfigError
from unclip.numbers import plain

MAX_CHANNELS = 16_384
MAX_LAYERS = 256
MAX_PARAMETERS = 50_000_000_000


class Anything:
    """Every value: for keys that cannot change what the network computes."""

    def __contains__(self, value: object) -> bool:
        return True


ANYTHING = Anything()


@dataclass(frozen=True, eq=False)
class ModelConfig(Mapping[str, Any]):
    """Base of the networks' configurations: `config.key`, `config["key"]`, `dict(config)`.

    `NEUTRAL` names the keys that the ecosystem's class of the same name has and this one does not, each with the
    values at which they change nothing; only those are accepted. Building one raises ConfigError for a value that
    is of a wrong kind, outside its limits or not implemented.
    """

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...] | Anything]] = {}

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            value = tuple(map(plain, value)) if isinstance(value, list | tuple) else plain(value)
            object.__setattr__(self, field.name, value)
        self.check()
        count = self.approximate_parameters()
        if count > MAX_PARAMETERS:
            raise ConfigError(
                f"{self._name} describes a network of about {count:.1e} parameters; the limit is {MAX_PARAMETERS:.0e}. "
                "Use fewer layers or narrower ones."
            )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The configuration that `settings` (a parsed config.json, say) describes; keys with a leading _ are skipped.

        Raises:
            ConfigError: an unknown or missing key, a value outside its limits, or a setting that is not implemented.
        """
        known = {field.name: field for field in fields(cls)}
        kept = {}
        for key, value in settings.items():
            if key.startswith("_"):
                continue
            value = tuple(value) if isinstance(value, list) else value
            if key in known:
                kept[key] = value
            elif key not in cls.NEUTRAL:
                raise ConfigError(f"{cls.__name__} has no setting {key!r:.80} (its value is {value!r:.200}); remove it")
            elif value not in cls.NEUTRAL[key]:
                allowed = cls.NEUTRAL[key]
                assert isinstance(allowed, tuple)
                raise ConfigError(
                    f"{cls.__name__}: {key} = {value!r:.200} is not implemented; supported: {_list(allowed)}"
                )
        missing = [
            name
            for name, field in known.items()
            if name not in kept and field.default is MISSING and field.default_factory is MISSING
        ]
        if missing:
            raise ConfigError(f"{cls.__name__} needs a value for {', '.join(missing)}")
        return cls(**kept)

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be used."""

    def approximate_parameters(self) -> int:
        """About how many parameters such a network has; only to refuse the absurd."""
        return 0

    def __getitem__(self, key: str) -> Any:
        if key not in tuple(self):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _refuse(self, key: str, wanted: str, value: Any) -> ConfigError:
        return ConfigError(f"{self._name}: {key} is {value!r:.200}; it must be {wanted}")

    def check_whole(self, *keys: str, low: int = 1, high: int = MAX_CHANNELS, optional: bool = False) -> None:
        """Each of `keys` is a whole number from `low` to `high`, or None if `optional`; where its type allows a tuple,
        also a tuple of such numbers, not empty.
        """
        for key in keys:
            value = getattr(self, key)
            if value is None and optional:
                continue
            for number in self._elements(key, value):
                if type(number) is not int or not low <= number <= high:
                    raise self._refuse(key, f"a whole number from {low} to {high}", value)

    def check_real(self, *keys: str, low: float, high: float) -> None:
        """Each of `keys` is a number with low <= number < high."""
        for key in keys:
            value = getattr(self, key)
            if type(value) not in (int, float) or not low <= value < high:
                raise self._refuse(key, f"a number from {low} to below {high}", value)

    def check_one_of(self, key: str, allowed: tuple[Any, ...]) -> None:
        """`key` (every element of it, if its type allows a tuple) is one of `allowed`, in value and in type."""
        value = getattr(self, key)
        for element in self._elements(key, value):
            if not any(type(element) is type(choice) and element == choice for choice in allowed):
                raise ConfigError(
                    f"{self._name}: {key} = {element!r:.200} is not implemented; supported: {_list(allowed)}"
                )

    def _elements(self, key: str, value: Any) -> tuple[Any, ...]:
        is_list = isinstance(value, tuple) and value and "tuple" in str(type(self).__dataclass_fields__[key].type)
        return value if is_list else (value,)

    def check_divides(self, divisor: int, number: int, why: str) -> None:
        """`number` is a multiple of `divisor`."""
        if number % divisor:
            raise ConfigError(f"{self._name}: {divisor} does not divide {number}: {why}")


def _list(values: tuple[Any, ...]) -> str:
    return ", ".join(repr(value) for value in values)
