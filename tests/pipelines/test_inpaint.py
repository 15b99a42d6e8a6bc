"""Inpainting and image to image."""

import numpy as np
import pytest
import torch
from PIL import Image

from unclip import (
    Cancelled,
    ConfigError,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    ImageError,
    InputError,
    UnCLIPImageVariationPipeline,
    UnCLIPInpaintPipeline,
    UnCLIPPipeline,
)
from unclip.evaluation.measures import seam
from unclip.images import rgb, to_tensor
from unclip.pipelines.masks import read_pictures

CLOSE = {"rtol": 0, "atol": 1e-5}


def noisy(width=16, height=16, seed=0):
    """A picture of noise, so that no pixel comes out right by chance."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def left_half(width=16, height=16):
    """A mask that is white in the left half, which is replaced."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, : width // 2] = 255
    return Image.fromarray(mask)


PICTURE, MASK = noisy(), left_half()
FEW = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 3, "super_res_num_inference_steps": 3}
FEW |= {"num_resamples": 2, "seed": 1}


@pytest.fixture
def edit(tiny_inpaint):
    """Run the shared pipeline in few steps; returns 8-bit arrays [batch, height, width, 3]."""

    def run(*args, **arguments):
        pictures = tiny_inpaint(*args, **{**FEW, **arguments}).images
        return np.stack([np.asarray(picture) for picture in pictures])

    return run


def changed(result, picture):
    """Which pixels are others, bool [height, width]."""
    return (result != np.asarray(picture.convert("RGB"))).any(-1)


# ---- what stays and what is drawn ----


@pytest.mark.parametrize("arguments", [{}, {"num_resamples": 1}, {"jump_length": 2}, {"strength": 0.4}])
def test_outside_the_mask_pixels_stay_to_the_bit(edit, arguments):
    (result,) = edit("a cat", PICTURE, MASK, **arguments)
    there = changed(result, PICTURE)
    assert not there[:, 8:].any()
    assert there[:, :8].mean() > 0.9


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_with_other_samplers(tiny_components, build_pipeline, scheduler):
    pipe = build_pipeline("inpaint", tiny_components())
    pipe.decoder_scheduler = scheduler.from_config(pipe.decoder_scheduler.config)
    pipe.super_res_scheduler = scheduler.from_config(pipe.super_res_scheduler.config)
    there = changed(np.asarray(pipe("a cat", PICTURE, MASK, **FEW).images[0]), PICTURE)
    assert not there[:, 8:].any()
    assert there[:, :8].mean() > 0.9


def test_in_half_precision_pixels_stay_too(tiny_components, build_pipeline):
    pipe = build_pipeline("inpaint", tiny_components()).to(torch.bfloat16)
    there = changed(np.asarray(pipe("a cat", PICTURE, MASK, **FEW).images[0]), PICTURE)
    assert not there[:, 8:].any()
    assert there[:, :8].any()


def test_kept_pixels_in_arrays_and_tensors(tiny_inpaint):
    for form in ("np", "pt"):
        images = tiny_inpaint("a cat", PICTURE, MASK, output_type=form, **FEW).images
        kept = images[0, :, :, 8:] if form == "pt" else images[0, :, 8:].transpose(2, 0, 1)
        expected = np.asarray(PICTURE).transpose(2, 0, 1)[:, :, 8:] / 255
        np.testing.assert_allclose(np.asarray(kept), expected, rtol=0, atol=1e-6)


def test_the_known_part_is_known_to_both_stages(tiny_inpaint):
    """At 8 px too: what of the small picture lies outside the mask is the picture's average there."""
    output = tiny_inpaint("a cat", PICTURE, MASK, output_type="pt", return_intermediates=True, **FEW)
    shrunk = torch.from_numpy(np.asarray(PICTURE) / 255).permute(2, 0, 1).unflatten(1, (8, 2)).unflatten(3, (8, 2))
    torch.testing.assert_close(output.small_images[0, :, :, 4:], shrunk.mean((2, 4))[:, :, 4:].float(), **CLOSE)
    assert (output.small_images[0, :, :, :4] - shrunk.mean((2, 4))[:, :, :4]).abs().max() > 0.05


def test_a_small_pixel_is_replaced_if_the_mask_touches_it(tiny_inpaint, edit):
    """With a mask of one pixel, the whole small pixel is replaced, and only that one pixel of the result."""
    mask = Image.new("L", (16, 16), 0)
    mask.putpixel((5, 9), 255)
    (result,) = edit("a cat", PICTURE, mask)
    assert np.argwhere(changed(result, PICTURE)).tolist() == [[9, 5]]
    small = tiny_inpaint("a cat", PICTURE, mask, output_type="pt", return_intermediates=True, **FEW).small_images
    (other,) = tiny_inpaint("a cat", PICTURE, MASK, output_type="pt", return_intermediates=True, **FEW).small_images
    differs = ((small[0] - other).abs() > 1e-4).any(0)
    assert differs[4, 2]


def test_the_replaced_region_depends_on_the_rest(edit):
    """The replaced half depends on the kept one, and is not an independent picture."""
    other = noisy(seed=7)
    assert changed(edit("a cat", PICTURE, MASK)[0], Image.fromarray(edit("a cat", other, MASK)[0]))[:, :8].mean() > 0.5


def test_pixels_under_the_mask_have_no_effect_at_full_strength(edit):
    hidden = PICTURE.copy()
    hidden.paste((255, 0, 0), (0, 0, 8, 16))
    assert np.array_equal(edit("a cat", PICTURE, MASK), edit("a cat", hidden, MASK))
    lower = {"strength": 0.4}
    assert not np.array_equal(edit("a cat", PICTURE, MASK, **lower), edit("a cat", hidden, MASK, **lower))


def test_resampling_changes_the_replaced_region(edit):
    one = edit("a cat", PICTURE, MASK, num_resamples=1)
    assert not np.array_equal(one, edit("a cat", PICTURE, MASK, num_resamples=3))
    assert np.array_equal(one, edit("a cat", PICTURE, MASK, num_resamples=1, jump_length=2))


def test_steps_of_a_resampled_path(tiny_inpaint):
    told = []
    tiny_inpaint("a cat", PICTURE, MASK, callback_on_step_end=lambda *given: told.append(given[3]["stage"]), **FEW)
    assert [told.count(stage) for stage in ("prior", "decoder", "super_res")] == [2, 2 * 2 + 1, 2 * 2 + 1]


@pytest.mark.parametrize("kind", ["uint8", "float", "bool", "lists", "batches"])
def test_arrays_are_pictures_and_masks(edit, kind):
    levels, white = np.asarray(PICTURE), np.asarray(MASK)
    picture, mask = {
        "uint8": (levels, white),
        "float": ((levels / 255).astype(np.float32), white / 255),
        "bool": (levels, white > 0),
        "lists": ([levels], [white[..., None]]),
        "batches": (levels[None], white[None]),
    }[kind]
    assert np.array_equal(edit("a cat", picture, mask), edit("a cat", PICTURE, MASK))


def test_a_batch_of_masks(edit):
    masks = np.stack([np.asarray(MASK), np.asarray(MASK)[:, ::-1]])
    first, second = edit("a cat", np.asarray(PICTURE)[None].repeat(2, 0), masks)
    assert changed(first, PICTURE)[:, :8].any()
    assert not changed(first, PICTURE)[:, 8:].any()
    assert not changed(second, PICTURE)[:, :8].any()


def test_an_array_with_transparency(edit):
    holed = np.dstack([np.asarray(PICTURE), 255 - np.asarray(MASK)])
    (result,) = edit("a cat", holed)
    assert not changed(result, PICTURE)[:, 8:].any()
    assert changed(result, PICTURE)[:, :8].mean() > 0.9


@pytest.mark.parametrize("mode", ["I;16", "L"])
def test_a_mask_with_a_transparent_colour(edit, mode):
    levels = np.full((16, 16), 40_000 if mode == "I;16" else 200, np.uint16 if mode == "I;16" else np.uint8)
    levels[:, :4] = 7
    mask = Image.fromarray(levels)
    mask.info["transparency"] = 7
    there = changed(edit("a cat", PICTURE, mask)[0], PICTURE)
    assert there[:, :4].mean() > 0.9
    assert not there[:, 4:].any()


# ---- strength ----


def test_without_a_mask_a_strength_keeps_some_of_the_picture(edit):
    whole = np.asarray(PICTURE, dtype=float)
    distances = [np.abs(edit("a cat", PICTURE, strength=s)[0] - whole).mean() for s in (0.1, 0.5, 0.9)]
    assert distances[0] < distances[1] < distances[2]
    assert distances[0] > 0


def test_strength_is_the_share_of_the_steps(tiny_inpaint):
    told = []

    def callback(pipeline, step, timestep, about):
        told.append((about["stage"], timestep))

    steps = FEW | {"decoder_num_inference_steps": 10, "super_res_num_inference_steps": 4}
    tiny_inpaint("a cat", PICTURE, strength=0.5, callback_on_step_end=callback, **steps)
    decoder = [timestep for stage, timestep in told if stage == "decoder"]
    assert decoder == [444, 333, 222, 111, 0]
    assert [timestep for stage, timestep in told if stage == "super_res"] == [333, 0]


def test_the_least_strength_takes_one_step(edit):
    assert edit("a cat", PICTURE, strength=1e-6).shape == (1, 16, 16, 3)


# ---- what decides ----


def test_the_prompt_changes_the_result(edit):
    assert not np.array_equal(edit("a cat", PICTURE, MASK), edit("a red apple", PICTURE, MASK))
    assert not np.array_equal(edit("a cat", PICTURE, MASK), edit("a cat", PICTURE, MASK, negative_prompt="an apple"))


def test_without_a_prompt_the_picture_is_embedded(tiny_inpaint, tiny_variation, edit):
    output = tiny_inpaint(None, PICTURE, MASK, return_intermediates=True, **FEW)
    own = tiny_variation(PICTURE, seed=1, return_intermediates=True, decoder_num_inference_steps=1).image_embeddings
    torch.testing.assert_close(output.image_embeddings, own, **CLOSE)
    result = edit(None, PICTURE, MASK)
    assert np.array_equal(result, edit("", PICTURE, MASK, embedding_from="image"))
    assert np.array_equal(result, edit(None, PICTURE, MASK, image_embeddings=own))
    assert not np.array_equal(result, edit("a cat", PICTURE, MASK, embedding_from="image"))
    assert not np.array_equal(result, edit(None, PICTURE, MASK, image_embeddings=own + 1))


def test_the_prompts_embedding_is_the_priors(tiny_inpaint, tiny_pipeline):
    steps = {name: FEW[name] for name in FEW if name != "num_resamples"}
    of_text = tiny_pipeline("a cat", return_intermediates=True, **steps).image_embeddings
    for asked in (None, "prompt"):
        output = tiny_inpaint("a cat", PICTURE, MASK, embedding_from=asked, return_intermediates=True, **FEW)
        torch.testing.assert_close(output.image_embeddings, of_text, **CLOSE)


# ---- batches ----


# At timestep 999 a random network's x0 is decided by rounding (see parity/test_pipelines.py), so these start lower.


def test_a_result_of_a_batch_is_the_one_made_alone(edit):
    pictures, masks = [noisy(seed=1), noisy(seed=2)], [MASK, MASK.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    batch = edit(["a cat", "an apple"], pictures, masks, num_images_per_prompt=2, seed=10, strength=0.6)
    assert batch.shape == (4, 16, 16, 3)
    for i in range(4):
        row = i // 2
        alone = edit(["a cat", "an apple"][row], pictures[row], masks[row], seed=10 + i, strength=0.6)
        assert np.abs(batch[i].astype(int) - alone[0]).max() <= 1
    assert not changed(batch[1], pictures[0])[:, 8:].any()
    assert not changed(batch[2], pictures[1])[:, :8].any()


def test_one_picture_for_several_prompts_and_one_prompt_for_several_pictures(edit):
    of_prompts = edit(["a cat", "an apple"], PICTURE, MASK, seed=4, strength=0.6)
    assert np.abs(of_prompts[1].astype(int) - edit("an apple", PICTURE, MASK, seed=5, strength=0.6)[0]).max() <= 1
    of_pictures = edit("a cat", [PICTURE, noisy(seed=3)], MASK, seed=4, strength=0.6)
    assert np.abs(of_pictures[1].astype(int) - edit("a cat", noisy(seed=3), MASK, seed=5, strength=0.6)[0]).max() <= 1


# ---- masks and sizes ----


def test_equivalent_masks(edit):
    result = edit("a cat", PICTURE, MASK)
    transparent = Image.new("RGBA", (16, 16), "blue")
    transparent.paste((9, 9, 9, 0), (0, 0, 8, 16))
    own = PICTURE.convert("RGBA")
    own.paste((255, 255, 255, 0), (0, 0, 8, 16))
    assert np.array_equal(edit("a cat", PICTURE, transparent), result)
    assert np.array_equal(edit("a cat", PICTURE, MASK.convert("1")), result)
    assert np.array_equal(edit("a cat", PICTURE, MASK.convert("RGB")), result)
    assert np.array_equal(edit("a cat", PICTURE, MASK.convert("RGBA")), result)
    assert np.array_equal(edit("a cat", PICTURE, MASK.convert("LA")), result)
    assert np.array_equal(edit("a cat", own), result)


def test_an_opaque_alpha_channel_is_ignored(edit):
    whole = edit("a cat", [PICTURE, noisy(seed=2)], strength=0.6)
    assert np.array_equal(edit("a cat", [PICTURE, noisy(seed=2).convert("RGBA")], strength=0.6), whole)
    assert np.array_equal(edit("a cat", PICTURE.convert("RGBA"), MASK), edit("a cat", PICTURE, MASK))


def see_through(seed=0):
    """A picture of noise in every channel: some pixels half transparent, some wholly, with colours that are hidden."""
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    pixels[:4, :, 3] = 0
    return Image.fromarray(pixels)


def test_transparency_outside_the_mask_stays_to_the_bit(tiny_inpaint, edit):
    own = see_through()
    (result,) = tiny_inpaint("a cat", own, MASK, **FEW).images
    assert result.mode == "RGBA"
    found = np.asarray(result)
    assert np.array_equal(found[:, 8:], np.asarray(own)[:, 8:])
    assert (found[:, :8, 3] == 255).all()
    assert np.array_equal(found[:, :8, :3], edit("a cat", rgb(own), MASK)[0][:, :8])
    (as_tuple,) = tiny_inpaint("a cat", own, MASK, return_dict=False, **FEW)
    assert np.array_equal(np.asarray(as_tuple[0]), found)
    numbers = tiny_inpaint("a cat", own, MASK, output_type="np", **FEW).images[0]
    np.testing.assert_allclose(numbers[:, 8:], np.asarray(rgb(own))[:, 8:] / 255, rtol=0, atol=1e-6)


def test_each_of_a_batch_keeps_its_own_transparency(tiny_inpaint):
    pictures = [see_through(1), PICTURE, see_through(2)]
    results = tiny_inpaint("a cat", pictures, MASK, num_images_per_prompt=2, **FEW).images
    assert [result.mode for result in results] == ["RGBA"] * 2 + ["RGB"] * 2 + ["RGBA"] * 2
    for result, own in zip(results, [picture for picture in pictures for _ in range(2)], strict=True):
        assert np.array_equal(np.asarray(result)[:, 8:], np.asarray(own)[:, 8:])
    several = tiny_inpaint(["a cat", "an apple"], see_through(1), MASK, **FEW).images
    for result in several:
        assert np.array_equal(np.asarray(result)[:, 8:], np.asarray(see_through(1))[:, 8:])
    (resized,) = tiny_inpaint("a cat", see_through(), MASK, height=8, width=8, **FEW).images
    assert resized.mode == "RGB"


def test_half_transparent_pixels_stay(edit):
    mask = Image.new("RGBA", (16, 16), (0, 0, 0, 1))
    mask.paste((0, 0, 0, 0), (4, 4, 8, 8))
    there = changed(edit("a cat", PICTURE, mask)[0], PICTURE)
    assert there[4:8, 4:8].all()
    assert there.sum() == 16


def test_half_transparent_pixels_of_the_picture_are_replaced(edit):
    """Transparent pixels become white, so their colour is not kept."""
    own = PICTURE.convert("RGBA")
    own.putalpha(Image.fromarray(np.clip(np.arange(16) * 51, 0, 255).astype(np.uint8)[None].repeat(16, axis=0)))
    (result,) = edit("a cat", own)
    assert not changed(result, PICTURE)[:, 5:].any()
    assert changed(result, rgb(own))[:, 1:5].mean() > 0.9


@pytest.mark.parametrize("side", [8, 11, 40])
def test_a_hole_does_not_bleed_into_what_stays_when_resized(edit, side):
    own = Image.new("RGBA", (side, side), (40, 60, 200, 255))
    own.paste((255, 255, 255, 0), (0, 0, side // 2, side))
    (result,) = edit("a cat", own)
    assert result.shape == (16, 16, 3)
    assert np.abs(result[:, 9:].astype(int) - (40, 60, 200)).max() <= 1
    assert (np.abs(result[:, :8].astype(int) - (40, 60, 200)).max(-1) > 5).mean() > 0.5


def test_a_speckled_hole_does_not_bleed_either():
    holes = np.random.default_rng(3).random((24, 24)) < 0.5
    pixels = np.full((24, 24, 4), (90, 160, 20, 255), dtype=np.uint8)
    pixels[holes] = (255, 255, 255, 0)
    given = read_pictures(Image.fromarray(pixels), None, lambda size: (64, 64))
    kept = ~given.region[0, 0]
    assert kept.any()
    wanted = torch.tensor([90, 160, 20])[:, None] / 127.5 - 1
    assert float((given.x0[0][:, kept] - wanted).abs().max()) < 0.02


def test_resized_pixels_far_from_a_hole_are_as_without_it():
    picture = noisy(40, 40)
    own = picture.convert("RGBA")
    own.paste((255, 255, 255, 0), (0, 0, 8, 40))
    given = read_pictures(own, None, lambda size: (64, 64))
    plain = to_tensor(picture.resize((64, 64), Image.Resampling.LANCZOS))
    assert torch.equal(given.x0[0, :, :, 24:], plain[:, :, 24:])


def test_a_picture_turned_by_its_camera(edit):
    """The mask is of the upright picture, and so is the result."""
    turned, exif = noisy(16, 16, seed=5), Image.Exif()
    exif[0x0112] = 6
    turned.getexif().update(exif)
    upright = Image.fromarray(np.rot90(np.asarray(turned), 3))
    there = changed(edit("a cat", turned, MASK)[0], upright)
    assert not there[:, 8:].any()
    assert there[:, :8].any()


@pytest.mark.parametrize(("size", "expected"), [((40, 40), (16, 16)), ((60, 30), (24, 12)), ((30, 60), (12, 24))])
def test_pictures_of_other_sizes(edit, size, expected):
    """The result has the picture's shape in the model's number of pixels; kept pixels are the resized picture's."""
    picture, mask = noisy(*size), left_half(*size)
    (result,) = edit("a cat", picture, mask)
    assert result.shape == (expected[1], expected[0], 3)
    resized = picture.resize(expected, Image.Resampling.LANCZOS)
    there, half = changed(result, resized), expected[0] // 2
    assert not there[:, half:].any()
    assert there[:, :half].mean() > 0.9


def test_a_given_height_and_width(edit):
    (result,) = edit("a cat", noisy(20, 20), left_half(20, 20), height=8, width=32)
    assert result.shape == (8, 32, 3)
    assert not changed(result, noisy(20, 20).resize((32, 8), Image.Resampling.LANCZOS))[:, 16:].any()


def test_a_long_picture_is_squashed(edit):
    assert edit("a cat", noisy(160, 16), left_half(160, 16)).shape == (1, 8, 32, 3)


# ---- arguments that are wrong ----


@pytest.fixture
def nothing_runs(tiny_inpaint, monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("a stage ran")

    for network in (tiny_inpaint.prior, tiny_inpaint.decoder, tiny_inpaint.super_res_first):
        monkeypatch.setattr(network, "forward", run)


OPAQUE = Image.new("RGBA", (16, 16), "white")
HOLED = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
WRONG = [
    ({"image": None}, "image must be a PIL image, a numpy array, or a list of them, not a NoneType"),
    ({"image": []}, "image is an empty list"),
    ({"image": torch.zeros(1, 3, 16, 16)}, "not a Tensor"),
    ({"image": np.full((16, 16, 3), 2.0)}, "image is an array of float64 with values from 2 to 2"),
    ({"image": np.zeros((3, 16, 16), np.uint8)}, r"image is an array of the shape \(3, 16, 16\)"),
    ({"mask_image": np.full((16, 16), np.nan)}, "mask_image is an array with NaN"),
    ({"image": [PICTURE, "cat.png"]}, "not a list with a str"),
    ({"mask_image": "mask.png"}, "mask_image must be a PIL image"),
    ({"mask_image": left_half(17, 16)}, "the mask is 17×16 pixels, its picture 16×16"),
    ({"mask_image": Image.new("L", (16, 16), 0)}, "the mask has no white pixels"),
    ({"mask_image": Image.new("RGBA", (16, 16), "black")}, "the mask has no white pixels"),
    ({"mask_image": Image.new("RGBA", (16, 16), (255, 255, 255, 9))}, "the mask has no fully transparent pixels"),
    ({"image": OPAQUE, "mask_image": None}, "nothing of the picture would be kept"),
    ({"image": [PICTURE, OPAQUE], "mask_image": None}, "nothing of the picture would be kept"),
    ({"mask_image": [MASK, MASK]}, "there are 2 masks for 1 pictures"),
    ({"image": [HOLED, PICTURE], "mask_image": None}, "some of these pictures have transparency"),
    ({"image": [noisy(20, 10), noisy(10, 20)], "mask_image": None, "strength": 0.5}, "different shapes"),
    ({"mask_image": None}, "nothing of the picture would be kept"),
    ({"strength": 0}, "strength is 0; it must be a number above 0 to 1"),
    ({"strength": 1.01}, "strength is 1.01; it must be a number above 0 to 1"),
    ({"strength": float("nan")}, "strength is nan"),
    ({"strength": True}, "strength is True"),
    ({"strength": "half"}, "strength is 'half'"),
    ({"num_resamples": 0}, "num_resamples is 0; it must be a whole number from 1 to 100"),
    ({"num_resamples": 101}, "num_resamples is 101"),
    ({"jump_length": 0}, "jump_length is 0; it must be a whole number of at least 1"),
    ({"embedding_from": "picture"}, "embedding_from is 'picture'; it must be one of 'prompt', 'image'"),
    ({"prompt": None, "embedding_from": "prompt"}, "no prompt is given"),
    ({"embedding_from": "image", "image_embeddings": torch.zeros(1, 16)}, "image_embeddings or embedding_from"),
    ({"image_embeddings": torch.zeros(1, 15)}, r"image_embeddings have shape \(1, 15\)"),
    ({"prompt": ["a", "b"], "image": [PICTURE] * 3}, "there are 2 prompts, 3 pictures, 1 image_embeddings"),
    ({"prompt": 3}, "prompt must be a string"),
    ({"negative_prompt": ["a", "b"]}, "there are 2 captions for 1 pictures"),
    ({"height": 16}, "give both height and width, or neither"),
    ({"height": 10, "width": 16}, "height is 10; for this model it must be a multiple of 4, such as 8"),
    ({"height": 16, "width": 0}, "width is 0"),
    ({"decoder_num_inference_steps": 0}, "number of steps is 0"),
    ({"super_res_num_inference_steps": [3, 3]}, "has 2 values for 1 super-resolution stages"),
    ({"decoder_guidance_scale": float("inf")}, "decoder_guidance_scale is inf"),
    ({"prior_guidance_scale": -1}, "prior_guidance_scale is -1"),
    ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"generator": torch.Generator()}, "give seed or generator"),
]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments(edit, arguments, message):
    with pytest.raises(InputError, match=message):
        edit(**{"prompt": "a cat", "image": PICTURE, "mask_image": MASK, **arguments})


def test_a_picture_that_cannot_be_used(edit):
    with pytest.raises(ImageError, match="it is empty"):
        edit("a cat", Image.new("RGB", (0, 4)), MASK)


def test_a_callback_may_stop_the_run(tiny_inpaint):
    with pytest.raises(Cancelled, match="'super_res' after step 1 of 5"):
        tiny_inpaint(
            "a cat", PICTURE, MASK, callback_on_step_end=lambda *g: {"stop": g[3]["stage"] == "super_res"}, **FEW
        )


# ---- components ----


def test_a_text_to_image_folder_can_be_loaded(tiny_pipeline, tmp_path, edit):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    pipe = UnCLIPInpaintPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.image_encoder is None
    assert "image_encoder" not in pipe.components
    (result,) = pipe("a cat", PICTURE, MASK, **FEW).images
    assert np.array_equal(np.asarray(result), edit("a cat", PICTURE, MASK)[0])
    with pytest.raises(InputError, match="this model has no image_encoder"):
        pipe(None, PICTURE, MASK)


def test_from_other_pipelines(tiny_pipeline, tiny_variation, tiny_inpaint):
    bare = UnCLIPInpaintPipeline.from_pipe(tiny_pipeline)
    assert bare.decoder is tiny_pipeline.decoder
    more = {name: getattr(tiny_variation, name) for name in ("image_encoder", "feature_extractor")}
    assert UnCLIPInpaintPipeline.from_pipe(tiny_pipeline, **more).image_encoder is tiny_variation.image_encoder
    assert UnCLIPPipeline.from_pipe(tiny_inpaint).prior is tiny_inpaint.prior
    assert UnCLIPImageVariationPipeline.from_pipe(tiny_inpaint).image_encoder is tiny_inpaint.image_encoder


def test_saved_and_loaded(tiny_inpaint, tmp_path, edit):
    tiny_inpaint.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "image_encoder").is_dir()
    pipe = UnCLIPInpaintPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert next(iter(pipe.components)) == "image_encoder"
    assert np.array_equal(np.asarray(pipe(None, PICTURE, MASK, **FEW).images[0]), edit(None, PICTURE, MASK)[0])
    for cls in (UnCLIPPipeline, UnCLIPImageVariationPipeline):
        assert cls.from_pretrained(tmp_path / "model").components.keys() == set(cls.COMPONENTS)


def test_an_image_encoder_alone_or_of_another_width(tiny_pipeline, tiny_variation):
    with pytest.raises(ConfigError, match="belong together"):
        UnCLIPInpaintPipeline.from_pipe(tiny_pipeline, image_encoder=tiny_variation.image_encoder)
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    wide = CLIPVisionModelWithProjection(CLIPVisionConfig(**tiny, image_size=16, patch_size=8, projection_dim=24))
    with pytest.raises(ConfigError, match=r"image_encoder\.projection_dim is 24"):
        UnCLIPInpaintPipeline.from_pipe(
            tiny_pipeline, image_encoder=wide, feature_extractor=tiny_variation.feature_extractor
        )


# ---- the built-in model ----


@pytest.mark.slow
def test_the_built_in_model_fills_a_region_without_a_seam():
    """A hole in a picture, filled to fit: far less of a border than another picture pasted in has."""
    pipe = UnCLIPInpaintPipeline.from_pretrained("unclip-emoji")
    pipe.set_progress_bar_config(disable=True)
    text_to_image = UnCLIPPipeline.from_pipe(pipe)
    text_to_image.set_progress_bar_config(disable=True)
    original, other = text_to_image(["dog face", "cat face"], seed=1, **pipe.recommended).images
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (56, 24, 112, 104))
    result = pipe(None, original, mask, seed=4, num_resamples=2, **pipe.recommended).images[0]
    drawn = torch.from_numpy(np.asarray(mask) > 0)
    there = changed(np.asarray(result), original)
    assert not there[~drawn.numpy()].any()
    assert there[drawn.numpy()].mean() > 0.5
    filled, pasted = (seam(to_tensor(image), drawn) for image in (result, Image.composite(other, original, mask)))
    assert filled < pasted / 4  # the picture's own edges make some of both
