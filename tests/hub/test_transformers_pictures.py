"""The image processor: words that change what is done to a picture, against transformers' own."""

import json

import pytest
import torch
from ecosystem import library
from small import invented

transformers = library("transformers")
np = pytest.importorskip("numpy")
image_module = pytest.importorskip("PIL.Image")
import natcupy.transformers as ours  # noqa: E402  (after the library that it needs)

# Of even sizes, like all crops here: at odd ones the middle is a pixel further left elsewhere.
BYTES = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
IMAGE = image_module.fromarray(BYTES)
SQUARE = {"height": 30, "width": 20}
# What changes the shape, and what changes the numbers.
WORDS = [
    {"size": {"shortest_edge": 50}, "crop_size": {"height": 40, "width": 24}},
    {"size": {"shortest_edge": 16}},  # smaller than the crop: zeros around it
    {"crop_size": 30},
    {"size": SQUARE, "do_center_crop": False},
    {"size": (30, 20), "do_center_crop": False},
    {"do_center_crop": False},
    {"do_resize": False},
    {"do_resize": False, "do_center_crop": False},
    {"do_resize": False, "crop_size": {"height": 70, "width": 90}},
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
    {"resample": 2, "size": SQUARE, "crop_size": 14},
]


def model_of(mode="center", size=(3, 48, 48), **cfg):
    model = invented("nat")
    model.pretrained_cfg |= {"input_size": size, "crop_mode": mode, "crop_pct": 0.75, **cfg}
    return model


def folder_of(tmp_path, mode="center", **cfg):
    return model_of(mode, **cfg).save_pretrained(tmp_path / "model")


def load(folder, **words):
    return ours.NatcupyImageProcessor.from_pretrained(folder, **words)


def foreign(tmp_path, **words):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "ViTImageProcessor", **words}))
    return load(path)


def pixels(processor, images=IMAGE, **words):
    return processor(images, return_tensors="pt", **words)["pixel_values"]


def theirs(folder, **words):
    """transformers' own steps, with the words of our file; they know no better ones."""
    values = json.loads((folder / "preprocessor_config.json").read_text())
    for name in ("input_size", "crop_pct", "crop_mode", "image_processor_type"):
        del values[name]
    processor = transformers.ViTImageProcessorPil(**{**values, **words})
    return processor(IMAGE, return_tensors="pt")["pixel_values"].float()


@pytest.mark.parametrize("words", WORDS, ids=lambda words: " ".join(words))
def test_words_do_what_they_do_in_transformers(tmp_path, words):
    """With a call, as an attribute and given to from_pretrained; and after saving."""
    folder = folder_of(tmp_path)
    want = theirs(folder, **words)
    plain = load(folder)
    default = pixels(plain)
    called = pixels(plain, **words)
    close = {"atol": 2e-5 * max(1.0, want.abs().max().item()), "rtol": 0}
    torch.testing.assert_close(called, want, **close)
    assert called.shape != default.shape or not torch.allclose(called, default)
    assert torch.equal(pixels(plain), default), "a call changed the processor"
    told = load(folder, **words)
    assert torch.equal(pixels(told), called)
    told.save_pretrained(tmp_path / "saved")
    assert torch.equal(pixels(load(tmp_path / "saved")), called)
    for name, value in words.items():
        setattr(plain, name, value)
    assert torch.equal(pixels(plain), called)


@pytest.mark.parametrize("mode", ["center", "squash", "ink"])
@pytest.mark.parametrize(
    "change",
    [{"input_size": (3, 40, 24)}, {"crop_pct": 0.5}, {"crop_mode": "squash"}, {"crop_mode": "ink"}],
    ids=lambda change: next(iter(change)),
)
def test_natcupys_own_words_change_the_recipe(tmp_path, mode, change):
    want = model_of(mode, **{{"input_size": "size"}.get(k, k): v for k, v in change.items()
                             if k != "crop_mode"})  # fmt: skip
    want.pretrained_cfg |= change
    want = want.preprocess(IMAGE)
    folder = folder_of(tmp_path, mode)
    plain = load(folder)
    assert torch.equal(pixels(plain, **change), want)
    assert torch.equal(pixels(load(folder, **change)), want)
    for name, value in change.items():
        setattr(plain, name, value)
    assert torch.equal(pixels(plain), want)


def test_the_last_word_counts(tmp_path):
    processor = load(folder_of(tmp_path))
    processor.crop_size = 20
    assert pixels(processor).shape[-2:] == (20, 20)
    processor.input_size = (3, 32, 24)
    assert torch.equal(pixels(processor), model_of(size=(3, 32, 24)).preprocess(IMAGE))


@pytest.mark.parametrize("mode", ["squash", "ink"])
def test_a_size_where_nothing_is_cropped(tmp_path, mode):
    folder = folder_of(tmp_path, mode)
    want = model_of(mode, (3, 30, 20)).preprocess(IMAGE)
    assert torch.equal(pixels(load(folder), size=SQUARE), want)
    square = model_of(mode, (3, 25, 25)).preprocess(IMAGE)
    assert torch.equal(pixels(load(folder), size=25), square)


def test_words_of_a_foreign_file_count(tmp_path):
    plain = foreign(tmp_path, size=40)
    assert pixels(plain).shape == (1, 3, 40, 40)
    assert pixels(plain, size={"height": 20, "width": 30}).shape == (1, 3, 20, 30)
    unsaid = foreign(tmp_path, size=40, do_normalize=None, do_center_crop=None, resample=None)
    assert torch.equal(pixels(unsaid), pixels(plain))
    off = foreign(tmp_path, size=40, do_normalize=False, do_rescale=False)
    assert torch.allclose(pixels(off), pixels(plain, do_normalize=False) * 255)
    assert pixels(foreign(tmp_path, size=40, do_resize=False)).shape == (1, 3, 60, 90)
    crops = foreign(tmp_path, size={"shortest_edge": 50}, crop_size=25, do_center_crop=True)
    assert pixels(crops).shape == (1, 3, 25, 25)


def test_unknown_words_are_refused(tmp_path):
    processor = load(folder_of(tmp_path))
    with pytest.raises(TypeError, match="got sizes"):
        processor(IMAGE, sizes=5)
    rest = load(tmp_path / "model", do_normalize=False, sizes=5, return_unused_kwargs=True)
    assert rest[1] == {"sizes": 5} and rest[0].do_normalize is False


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ({"do_pad": True}, "do_pad must be left out"),
        ({"do_normalize": "yes"}, "do_normalize must be True or False, got 'yes'"),
        ({"rescale_factor": "1"}, "rescale_factor must be a finite number"),
        ({"size": {"longest_edge": 5}}, "size must be an int"),
        ({"size": 0}, "size must be an int from 1"),
        ({"crop_size": {"shortest_edge": 5}}, "crop_size must have a height"),
        ({"resample": 99}, "99"),
        ({"data_format": "columns"}, "columns"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_had_is_refused(tmp_path, words, rule):
    with pytest.raises(ValueError, match=rule):
        load(folder_of(tmp_path))(IMAGE, **words)


def test_a_crop_needs_a_size(tmp_path):
    with pytest.raises(ValueError, match="crop_size must be an int"):
        load(folder_of(tmp_path, "squash"))(IMAGE, do_center_crop=True)


def test_batches_are_pictures(tmp_path):
    processor = load(folder_of(tmp_path))
    one = pixels(processor)
    other = BYTES[::-1].copy()
    want = torch.cat([one, pixels(processor, other)])
    batch = np.stack([BYTES, other])
    channels_first = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    for images in (batch, torch.tensor(batch), channels_first, torch.tensor(channels_first),
                   [batch], [[BYTES], [other]], (BYTES, other)):  # fmt: skip
        assert torch.equal(pixels(processor, images), want)
    assert torch.equal(pixels(processor, batch[:1]), one)


@pytest.mark.parametrize("nothing", [[], np.zeros((0, 8, 8, 3), np.uint8)], ids=["list", "batch"])
def test_no_pictures_give_none(tmp_path, nothing):
    processor = load(folder_of(tmp_path))
    assert processor(nothing)["pixel_values"] == []
    assert len(pixels(processor, nothing)) == 0


def test_floats_are_scaled_already(tmp_path):
    processor = load(folder_of(tmp_path))
    floats = torch.tensor(BYTES.transpose(2, 0, 1)) / 255
    cut = pixels(processor, do_resize=False)
    torch.testing.assert_close(pixels(processor, floats, do_resize=False), cut)
    bare = pixels(processor, floats, do_rescale=False, do_normalize=False, do_resize=False,
                  do_center_crop=False)  # fmt: skip
    assert torch.equal(bare[0], floats)
    raw = pixels(processor, do_rescale=False, do_normalize=False, do_resize=False,
                 do_center_crop=False)  # fmt: skip
    assert torch.equal(raw[0], torch.tensor(BYTES.transpose(2, 0, 1), dtype=torch.float32))


def test_layouts(tmp_path):
    processor = load(folder_of(tmp_path))
    want = pixels(processor)
    last = pixels(processor, data_format="channels_last")
    assert torch.equal(last, want.permute(0, 2, 3, 1))
    thin = BYTES[:3].copy()  # a tensor of three rows would be taken for three channels
    told = pixels(processor, torch.tensor(thin), input_data_format="channels_last")
    assert torch.equal(told, pixels(processor, image_module.fromarray(thin)))
    told = pixels(processor, thin.transpose(2, 0, 1), input_data_format="channels_first")
    assert torch.equal(told, pixels(processor, thin))
    assert pixels(processor, device="meta").is_meta


def test_pictures_keep_their_own_size_upright(tmp_path):
    """Where nothing is resized, too, a camera's orientation counts, once."""
    exif = image_module.Exif()
    exif[0x0112] = 6
    IMAGE.save(tmp_path / "turned.png", exif=exif)
    processor = load(folder_of(tmp_path))
    words = {"do_resize": False, "do_center_crop": False}
    upright = IMAGE.rotate(-90, expand=True)
    got = pixels(processor, str(tmp_path / "turned.png"), **words)
    assert torch.equal(got, pixels(processor, upright, **words))
    sizes = processor([IMAGE, upright], **words)["pixel_values"]
    assert [tuple(picture.shape) for picture in sizes] == [(3, 60, 90), (3, 90, 60)]
