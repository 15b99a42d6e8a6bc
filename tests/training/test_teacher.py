"""A sentence encoder as a teacher: what it reads, the pictures that it selects, and what is trained by them."""

import dataclasses
import json

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from unclip.data.source import FolderSource
from unclip.errors import ConfigError, DataError
from unclip.training.clip import ClipTask, words_of
from unclip.training.recipe import TeacherSettings, read_recipe
from unclip.training.task import in_folders, make_task
from unclip.training.teacher import Phrase, Teacher, TeacherPhrases, read_phrases
from unclip.training.trainer import step_generator

WORDS = ["a", "red", "green", "blue", "orange", "circle", "square", "bar", "picture", "of", "disc", "crimson"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT of random weights that knows a dozen words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("teacher")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {
        "initializer_range": 0.5,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    lines = [
        {"text": "crimson disc", "means": ["red circle"]},
        {"text": "a disc", "concepts": ["blue circle"]},
        {"text": "a green square"},
    ]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def source(pictures):
    return FolderSource([pictures], [16])


def closest_of(settings, source):
    phrases = TeacherPhrases(settings, source, torch.device("cpu"))
    names = [record.concept for record in source.records]
    rows = zip(phrases.texts, phrases.rows.tolist(), strict=True)
    return {text: [names[i] for i in phrases.pictures[row].tolist()] for text, row in rows}, phrases


def test_padding_changes_nothing(encoder):
    teacher = Teacher(encoder)
    alone, together = teacher.read(["red circle"]), teacher.read(["red circle", "a picture of a big green square"])
    assert together.shape == (2, 32)
    torch.testing.assert_close(alone[0], together[0], atol=0.02, rtol=0)
    torch.testing.assert_close(together.float().norm(dim=1), torch.ones(2), atol=0.01, rtol=0)


def test_the_closest_pictures(encoder, corpus, source):
    closest, phrases = closest_of(TeacherSettings(encoder, corpus, temperature=0.001, named_bonus=2.0), source)
    assert closest["crimson disc"][0] == "red circle"  # by what it means
    assert closest["a disc"][0] == "blue circle"  # by its name
    assert closest["a green square"][0] == "green square"  # by what it says
    assert "orange bar" not in closest["a disc"]  # held out
    torch.testing.assert_close(phrases.probabilities.sum(dim=1), torch.ones(3))
    assert (phrases.probabilities[:, 0] >= phrases.probabilities[:, 1]).all()


def test_nonsense_stands_for_any_picture(encoder, corpus, source, tmp_path):
    with_nonsense = tmp_path / "with-nonsense.jsonl"
    with_nonsense.write_text(corpus.read_text() + '{"text": "asdfgh", "means": []}\n{"text": "blorf", "means": []}\n')
    _, before = closest_of(TeacherSettings(encoder, corpus), source)
    _, phrases = closest_of(TeacherSettings(encoder, with_nonsense), source)
    assert torch.equal(phrases.probabilities[:3], before.probabilities)
    row, other = phrases.rows[-2:].tolist()
    assert row != other
    assert phrases.probabilities[row].unique().numel() == 1
    assert phrases.embeddings[row].eq(0).all()
    shown = {source.records[number].concept for number in phrases.pictures[3:].flatten().tolist()}
    assert shown == {record.concept for record in source.records if not record.held_out}
    with_nonsense.write_text('{"text": "asdfgh", "means": []}\n')
    with pytest.raises(DataError, match="no phrase has a text"):
        closest_of(TeacherSettings(encoder, with_nonsense), source)


def test_a_temperature(encoder, corpus, source):
    cold, warm = (
        closest_of(TeacherSettings(encoder, corpus, temperature=t), source)[1].probabilities[:, 0] for t in (0.01, 10.0)
    )
    assert (cold > 0.5).all()
    assert (warm < 0.3).all()


def test_captions_are_the_phrases_without_a_corpus(encoder, source):
    closest, _ = closest_of(TeacherSettings(encoder, temperature=0.001), source)
    assert len(closest) == 30
    assert closest["a picture of a red bar"][0] == "red bar"


def test_what_was_read_is_not_read_again(encoder, corpus, source, monkeypatch):
    settings = TeacherSettings(encoder, corpus)
    before = TeacherPhrases(settings, source, torch.device("cpu"))
    monkeypatch.setattr(Teacher, "read", lambda *_: pytest.fail("read again"))
    after = TeacherPhrases(settings, source, torch.device("cpu"))
    assert torch.equal(before.probabilities, after.probabilities)
    assert torch.equal(before.embeddings, after.embeddings)


def test_an_interrupted_reading_goes_on(encoder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("unclip.training.teacher.PART", 2)
    texts = ["red", "a red", "red disc", "green square", "blue circle"]
    teacher = Teacher(encoder)
    encode, encoded = teacher._encode, []

    def stops(part):
        if len(encoded) == 1:
            raise KeyboardInterrupt
        encoded.append(part)
        return encode(part)

    monkeypatch.setattr(teacher, "_encode", stops)
    with pytest.raises(KeyboardInterrupt):
        teacher.read(texts)
    again = Teacher(encoder)
    monkeypatch.setattr(again, "_encode", lambda part: encoded.append(part) or encode(part))
    read = again.read(texts)
    assert [text for part in encoded for text in part] == sorted(texts, key=len)  # each text once
    torch.testing.assert_close(read, torch.cat([encode([text]) for text in texts]), atol=0.02, rtol=0)


def test_a_damaged_cache_is_read_again(encoder, corpus, source, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = TeacherSettings(encoder, corpus)
    before = TeacherPhrases(settings, source, torch.device("cpu"))
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    path.write_bytes(b"")
    assert torch.equal(TeacherPhrases(settings, source, torch.device("cpu")).probabilities, before.probabilities)


def taught_clip(tiny, encoder, corpus, clip_model, **section):
    section = {"reconstruction_weight": 0.0, "image_from": clip_model} | section
    return tiny("clip", section=section, teacher=TeacherSettings(encoder, corpus))


def test_a_text_encoder_learns_and_the_image_encoder_stays(tiny, encoder, corpus, clip_model, tmp_path):
    task = ClipTask(taught_clip(tiny, encoder, corpus, clip_model))
    image = {name: value.clone() for name, value in task.module.image.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in task.module.parameters() if p.requires_grad], lr=2e-3)
    found = []
    for step in range(60):
        metrics = task.module(task.batch(step, 16, step_generator(0, step)))
        optimizer.zero_grad()
        metrics["loss"].backward()
        optimizer.step()
        found.append(metrics)
    assert found[-1]["taught"] < found[0]["taught"]
    assert found[-1]["taught_cosine"] > found[0]["taught_cosine"] + 0.3
    assert all(torch.equal(value, image[name]) for name, value in task.module.image.state_dict().items())
    task.save(tmp_path / "model")
    assert not (tmp_path / "model" / "taught").exists()


def test_words_begin_as_the_teacher_has_them(tiny, encoder, corpus, clip_model):
    task = ClipTask(taught_clip(tiny, encoder, corpus, clip_model))
    known = words_of(task.tokenizer)
    assert {"red", "circle", "disc"} <= set(known.values())
    table = task.module.text.get_input_embeddings().weight.detach()[list(known)]
    assert table.std() == pytest.approx(0.02, rel=0.05)
    read = task.phrases.teacher.read(list(known.values())).float()
    wanted = torch.nn.functional.cosine_similarity(*(read - read.mean(dim=0))[[0, 1]], dim=0)
    assert torch.nn.functional.cosine_similarity(*table[:2], dim=0) == pytest.approx(wanted.item(), abs=0.05)


def test_the_image_encoder_alone_can_be_kept(tiny, clip_model):
    task = ClipTask(tiny("clip", section={"reconstruction_weight": 0.0, "image_from": clip_model}))
    metrics = task.module(task.batch(0, 8, step_generator(0, 0)))
    assert "taught" not in metrics
    metrics["loss"].backward()
    assert all(p.grad is None for p in task.module.image.parameters())


def test_a_width_that_does_not_fit(tiny, encoder, corpus, clip_model):
    recipe = taught_clip(tiny, encoder, corpus, clip_model, projection_dim=64)
    with pytest.raises(ConfigError, match=r"projection_dim is 64, but the image encoder in .* has \d+"):
        ClipTask(recipe)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_phrases_with_the_teachers_pictures(tiny, encoder, corpus, stage):
    recipe = tiny(stage, teacher=TeacherSettings(encoder, corpus, share=1.0, temperature=0.001, named_bonus=2.0))
    task = make_task(recipe)
    rows, embeddings, _ = task.data.draw(0, 12, step_generator(0, 0))
    names = {task.source.records[i].concept for i in rows.index.tolist()}
    assert set(rows.captions) <= {"crimson disc", "a disc", "a green square"}
    assert names <= {"red circle", "blue circle", "green square"}
    assert torch.equal(embeddings, task.data.table[rows.index])
    for caption, row in zip(rows.captions, rows.index.tolist(), strict=True):
        wanted = {"crimson disc": "red circle", "a disc": "blue circle", "a green square": "green square"}[caption]
        assert task.source.records[row].concept == wanted
    untaught = make_task(dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, share=0.0)))
    plain = make_task(dataclasses.replace(recipe, teacher=None))
    one, other = (each.batch(0, 8, step_generator(0, 0)) for each in (untaught, plain))
    assert one["x0"].shape == other["x0"].shape


def test_shards_have_no_captions_to_compare_with():
    with pytest.raises(ConfigError, match=r"\[teacher\] needs data in folders"):
        in_folders(object(), "[teacher]")


def test_a_folder_without_an_encoder(tmp_path):
    with pytest.raises(ConfigError, match=r"teacher\.encoder is .*, which transformers cannot load"):
        Teacher(tmp_path)


def test_lines_of_a_corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text('plain words\n\n{"text": "a", "means": ["b", "c"], "concepts": ["d"]}\n')
    assert list(read_phrases(path)) == [Phrase("plain words", ("plain words",)), Phrase("a", ("b", "c"), ("d",))]


@pytest.mark.parametrize("line", ['{"text": ', '{"means": ["a"]}', '{"text": "a", "means": "b"}', '{"text": 3}'])
def test_a_broken_line(tmp_path, line):
    path = tmp_path / "corpus.jsonl"
    path.write_text(f"good\n{line}\n")
    with pytest.raises(DataError, match="line 2"):
        list(read_phrases(path))


def test_a_missing_corpus(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list(read_phrases(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('stage = "super_res"\ndata = "d"\n[super_res]\n[teacher]', r"\[teacher\] is for the stages clip, prior"),
        ('stage = "clip"\ndata = "d"\n[clip]\n[teacher]', r"\[teacher\] needs clip\.image_from"),
        (
            'stage = "clip"\ndata = "d"\n[clip]\nimage_from = "m"\nreconstruction_weight = 1',
            r"clip\.reconstruction_weight trains the image encoder",
        ),
        ('stage = "prior"\ndata = "d"\n[prior]\n[teacher]\ntemperature = 0', r"teacher\.temperature is 0"),
        ('stage = "prior"\ndata = "d"\n[prior]\n[teacher]\nshare = 2', r"teacher\.share is 2"),
    ],
)
def test_recipes_that_are_refused(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(path)
