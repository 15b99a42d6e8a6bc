"""The diffusion prior as a stage, the other kinds of prior, and the choice among candidates (paper §2.2)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unclip.diffusion.guidance import away
from unclip.diffusion.loop import Denoiser, NoiseSource, OnStep, Progress, StepInfo, replaced
from unclip.diffusion.process import DiffusionProcess
from unclip.errors import InputError
from unclip.models.layers import timestep_rows
from unclip.models.prior import PriorTransformer
from unclip.models.prior_autoregressive import AutoregressivePrior, CodeMemory, dot_product
from unclip.stages.arithmetic import exact_type
from unclip.stages.stage import PriorCondition


@dataclass(frozen=True)
class PriorStage:
    """Diffuses whitened image embeddings [batch, embedding_dim]."""

    prior: PriorTransformer
    process: DiffusionProcess

    def prepare(self, condition: PriorCondition) -> Denoiser:
        """Compute the text's tokens once; as attention is causal, they do not depend on the step."""
        text, dtype = condition.text, self.prior.dtype
        prefix = self.prior.prepare(text.embeds.to(dtype), text.hidden_states.to(dtype), text.mask)

        def denoise(x_t: Tensor, t: int | Tensor) -> Tensor:
            output = self.prior(x_t.to(dtype), timestep_rows(t, x_t), prefix=prefix)
            return output.predicted_image_embedding.float()

        return denoise

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        return (batch_size, self.prior.config.embedding_dim)

    def finish(self, x0: Tensor) -> Tensor:
        """Undo the whitening: the embedding on the scale of CLIP's image encoder."""
        return self.prior.post_process_latents(x0)


@dataclass(frozen=True)
class OneCallPriorStage:
    """Makes an image embedding of noise in one call of the network (ECLIPSE, arXiv 2312.04655).

    Guidance is not used. The output is on the scale of CLIP's image encoder: nothing is un-whitened.
    """

    prior: PriorTransformer

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        return (batch_size, self.prior.config.embedding_dim)

    def sample(
        self,
        condition: PriorCondition,
        *,
        noise: NoiseSource,
        null: PriorCondition | None = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """One image embedding for each row of `condition`, float32 [batch, embedding_dim].

        Args:
            condition: the captions.
            noise: the source of the network's input, unless `latents` of `sample_shape` are given.
            null, guidance_scale: ignored.
            progress: wraps the one step, as tqdm does.
            on_step: is called after it, with timestep 0.
        """
        shape, device, dtype = self.sample_shape(len(condition)), condition.device, self.prior.dtype
        x = noise.draw(shape, device) if latents is None else latents.to(device).float()
        text = condition.text
        for t, _ in [(0, -1)] if progress is None else progress([(0, -1)]):
            prefix = self.prior.prepare(text.embeds.to(dtype), text.hidden_states.to(dtype), text.mask)
            x = self.prior(x.to(dtype), t, prefix=prefix).predicted_image_embedding.float()
            x = replaced(x, None if on_step is None else on_step(StepInfo(0, 1, t, x, x)))
        return x


@dataclass(frozen=True)
class AutoregressivePriorStage:
    """Samples image embeddings code by code.

    A code is the inverse of its cumulative distribution at a uniform number, which is the normal distribution function
    of a noise number. So an embedding is a function of its noise, [1 + num_components] standard normal numbers. The
    buckets are in order, so rounding that differs between batches moves a code to its neighbour at most.

    Attributes:
        temperature: the logits are divided by it; below 1, likely codes become likelier; 0 takes the likeliest.
        top_p: samples only from the likeliest codes, whose probabilities sum to top_p (nucleus sampling, Holtzman et
            al. 2020, arXiv 1904.09751); 1 takes all.
    """

    prior: AutoregressivePrior
    temperature: float = 1.0
    top_p: float = 1.0

    def sample_shape(self, batch_size: int) -> tuple[int, ...]:
        """[batch, 1 + num_components]: a number for the dot product, and one for each code."""
        return (batch_size, 1 + self.prior.config.num_components)

    def sample(
        self,
        condition: PriorCondition,
        *,
        noise: NoiseSource,
        null: PriorCondition | None = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample one image embedding for each row of `condition`.

        The dot product is sampled from the upper half of the training data's (paper §2.2); the null condition has none.

        Args:
            condition: the captions.
            noise: the source of the numbers, unless `latents` are given.
            null: the condition that guidance moves away from, with as many rows; needed for a scale above 1.
            guidance_scale: 1 or less evaluates the network once for each code, without guidance.
            latents: the numbers, of `sample_shape`.
            progress: wraps the steps, as tqdm does.
            on_step: is called after each code; `x` and `x0` are the embedding of the codes so far, and `t` is the
                number of codes left. It may raise `Cancelled`, but cannot replace codes.

        Returns: float32 [batch, embedding_dim].

        Raises: InputError when `on_step` returns latents.
        """
        config, device = self.prior.config, condition.device
        if latents is None:
            latents = noise.draw(self.sample_shape(len(condition)), device)
        numbers = latents.to(device).float()
        places = _normal_cdf(numbers)
        dots = upper_half(places[:, 0], config.num_dot_buckets)
        guided = guidance_scale > 1
        if guided:
            assert null is not None
            condition, dots = null.join(condition), torch.cat([torch.full_like(dots, self.prior.no_dot_code), dots])
        codes: list[Tensor] = []
        memory = None
        count = config.num_components
        steps = [(k, k + 1) for k in range(count)]
        for k, _ in steps if progress is None else progress(steps):
            if memory is None:
                logits, memory = self._read(condition, dots, dots.new_zeros(len(dots), 0))
            else:
                logits, memory = self.prior(codes[-1].repeat(2 if guided else 1)[:, None], memory=memory)
            logits = logits[:, 0]
            if guided:
                logits = away(*logits.chunk(2), guidance_scale)
            codes.append(draw_code(logits, places[:, k + 1], self.temperature, self.top_p))
            if on_step is not None:
                so_far = self.prior.decode(torch.stack(codes, dim=1))
                if on_step(StepInfo(k, count, count - 1 - k, so_far, so_far)) is not None:
                    raise InputError("the codes of an autoregressive prior cannot be replaced: return None")
        return self.prior.decode(torch.stack(codes, dim=1))

    def log_likelihood(self, condition: PriorCondition, dot_codes: Tensor, codes: Tensor) -> Tensor:
        """log p(code | text, dot product, codes before it) in nats, float32 [batch, num_components].

        Args:
            condition: the captions.
            dot_codes: int64 [batch], from `AutoregressivePrior.dot_code`, or its `no_dot_code`.
            codes: int64 [batch, num_components], from `AutoregressivePrior.encode`.
        """
        logits, _ = self._read(condition, dot_codes, codes[:, :-1])
        return logits.log_softmax(dim=-1).gather(-1, codes[..., None])[..., 0]

    def _read(self, condition: PriorCondition, dots: Tensor, codes: Tensor) -> tuple[Tensor, CodeMemory]:
        text, dtype = condition.text, self.prior.dtype
        return self.prior(codes, dots, text.embeds.to(dtype), text.hidden_states.to(dtype), text.mask)


def upper_half(places: Tensor, num_buckets: int) -> Tensor:
    """Buckets of the upper half, with equal probability: int64, from `places` in [0, 1].

    Buckets are quantiles, so this is the upper half of the training data.
    """
    first = num_buckets // 2
    return (first + (places * (num_buckets - first)).long()).clamp(max=num_buckets - 1)


def draw_code(logits: Tensor, places: Tensor, temperature: float, top_p: float) -> Tensor:
    """The code where the cumulative distribution reaches `places`.

    Args:
        logits: float32 [batch, num_buckets].
        places: [batch] in [0, 1], in the type to compute in.
        temperature, top_p: see `AutoregressivePriorStage`.

    Returns: int64 [batch].
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.to(places.dtype)
    # The likeliest logit becomes 0, which no small temperature makes infinite.
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        spare = ordered.cumsum(dim=-1) - ordered >= top_p  # the likelier codes reach top_p without this one
        probabilities = probabilities.masked_fill(torch.zeros_like(spare).scatter(-1, order, spare), 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    codes = torch.searchsorted(cumulative, places[:, None] * cumulative[:, -1:], right=True)[:, 0]
    least = (probabilities.flip(-1) > 0).long().argmax(dim=-1)  # the last code may have no probability
    return codes.minimum(probabilities.shape[-1] - 1 - least)


def _normal_cdf(numbers: Tensor) -> Tensor:
    """The normal distribution function, in [0, 1]."""
    return torch.special.ndtr(numbers.to(exact_type(numbers.device)))


def sample_best(
    draw: Callable[[NoiseSource, Tensor | None], Tensor],
    text_embeddings: Tensor,
    *,
    num_candidates: int,
    captions_per_choice: int = 1,
    noise: NoiseSource,
    latents: Tensor | None = None,
) -> Tensor:
    """Sample `num_candidates` image embeddings for each caption and keep the one closest to it (see `closest`).

    Candidate k does not depend on the number of candidates, and the first one is sampled as if there were no others. So
    more candidates never lower the dot product, and where the first one is kept, all later noise is the same too.

    Args:
        draw: samples one embedding for each caption from a source of noise, or from given noise.
        text_embeddings: of the captions, [batch, embedding_dim].
        num_candidates: 1 or more; they are sampled one after another, so they need no more memory.
        captions_per_choice: see `closest`.
        noise: the source of the first candidate's noise; the others have branches of it.
        latents: noise for the first candidate.

    Returns: float32 [batch, embedding_dim].
    """
    starts = [(noise, latents), *((branch, None) for branch in noise.branches(num_candidates - 1))]
    return closest(text_embeddings, torch.stack([draw(*start) for start in starts]), captions_per_choice)


def closest(text_embeddings: Tensor, candidates: Tensor, captions_per_choice: int = 1) -> Tensor:
    """For each caption, the candidate with the largest dot product with it (paper §2.2).

    Both are normalised first, since CLIP was trained to compare directions.

    Args:
        text_embeddings: [batch, embedding_dim].
        candidates: [num_candidates, batch, embedding_dim]; of equal ones the first is kept.
        captions_per_choice: this many consecutive rows keep the candidate of the same number, whose dot products with
            their captions have the largest sum. It divides the batch.

    Returns: [batch, embedding_dim].
    """
    scores = torch.stack([dot_product(text_embeddings, candidate) for candidate in candidates])
    best = scores.unflatten(1, (-1, captions_per_choice)).sum(dim=2).argmax(dim=0)
    best = best.repeat_interleave(captions_per_choice)
    return candidates[best, torch.arange(len(best), device=best.device)]
