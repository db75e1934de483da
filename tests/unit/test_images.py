"""Images from files: every mode that Pillow reads either becomes the same picture in 8-bit RGB or is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mede2.trainer.data.images import load_image

RED, GREEN = (255, 0, 0), (0, 255, 0)


def pixels(path, window=None) -> np.ndarray:
    image = load_image(path, window)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def save(tmp_path):
    """`save(image, name, **options)` returns the path."""

    def save_image(image: Image.Image, name: str = "image.png", **options):
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save_image


def two_colours(mode: str = "RGB") -> Image.Image:
    """Left column red, right column green."""
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_colours_arrive_as_they_are(save, mode):
    assert pixels(save(two_colours(mode))).tolist() == [[list(RED), list(GREEN)]]


def test_cmyk_becomes_rgb(save):
    red, green = pixels(save(two_colours("CMYK"), "image.tif"))[0].astype(int)
    np.testing.assert_allclose((red, green), (RED, GREEN), atol=2)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_becomes_three_equal_channels(save, mode):
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert(mode)
    assert pixels(save(image)).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_refused(save, mode):
    image = two_colours(mode)
    image.putalpha(Image.fromarray(np.array([[255, 254]], dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"image\.png: transparent pixels; flatten"):
        load_image(save(image))


@pytest.mark.parametrize(("transparency", "refused"), [(0, True), (7, False)])
def test_transparent_palette_entry_is_refused_where_a_pixel_uses_it(save, transparency, refused):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN] + [0] * 3 * 254)
    image.putpixel((1, 0), 1)
    path = save(image, transparency=transparency)
    if refused:
        with pytest.raises(ValueError, match="transparent"):
            load_image(path)
    else:
        assert pixels(path).tolist() == [[list(RED), list(GREEN)]]


def test_exif_orientation_turns_the_picture_upright(save):
    """Orientation 6: the stored rows run down the right side, so the top row of the picture is the left column."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(two_colours(), exif=exif)
    assert pixels(path).tolist() == [[list(RED)], [list(GREEN)]]


SIXTEEN_BIT = np.array([[1000, 2000, 3000]], dtype=np.uint16)


@pytest.mark.parametrize("name", ["image.png", "image.tif"])
def test_sixteen_bits_are_scaled_by_the_window(save, name):
    """(v - 1000) / 2000 * 255: 0, 127.5 (to even: 128) and 255."""
    path = save(Image.fromarray(SIXTEEN_BIT), name)
    assert pixels(path, (1000.0, 3000.0))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("array", [SIXTEEN_BIT, SIXTEEN_BIT.astype(np.int32), SIXTEEN_BIT.astype(np.float32)])
def test_more_than_eight_bits_without_a_window_are_refused_with_the_range(save, array):
    path = save(Image.fromarray(array), "image.tif")
    with pytest.raises(ValueError, match=r"grey of more than 8 bits .*1000\.\.3000.*grey_window=\[1000,3000\]"):
        load_image(path)


@pytest.mark.parametrize("window", [(1001.0, 4000.0), (0.0, 2999.0)])
def test_a_window_that_would_clip_is_refused(save, window):
    with pytest.raises(ValueError, match=r"intensities 1000\.\.3000 outside grey_window .* would be clipped"):
        load_image(save(Image.fromarray(SIXTEEN_BIT), "image.tif"), window)


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)], ids=["RGB", "LA", "RGBA"])
def test_sixteen_bit_channels_are_refused(tmp_path, colour_type, channels):
    """Pillow would keep the high byte of each: of 12 bits of grey, four would be left. It writes no such PNG itself."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header, row = struct.pack(">IIBBBBB", 1, 1, 16, colour_type, 0, 0, 0), b"\0" + b"\x0f\xff" * channels
    path = tmp_path / "image.png"
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    with pytest.raises(ValueError, match=r"image\.png: 16 bits in each of several channels"):
        load_image(path, (0.0, 4095.0))


def test_a_window_leaves_eight_bits_alone(save):
    assert pixels(save(two_colours()), (1000.0, 3000.0)).tolist() == [[list(RED), list(GREEN)]]


@pytest.mark.parametrize("name", ["image.gif", "image.tif"])
def test_several_frames_are_refused(save, name):
    path = save(two_colours(), name, save_all=True, append_images=[Image.new("RGB", (2, 1), GREEN)])
    with pytest.raises(ValueError, match="2 frames; save the one"):
        load_image(path)


def test_truncated_file_is_refused(tmp_path, write_image):
    path = write_image(tmp_path / "image.png", 96, 96)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"image\.png: does not decode"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image\.png: does not decode"):
        load_image(path)


@pytest.mark.parametrize("keep", range(0, 51, 3))
def test_any_truncation_before_the_last_pixel_is_one_clear_error(tmp_path, keep):
    """Pillow raises several kinds of exception for them."""
    buffer = io.BytesIO()
    two_colours().save(buffer, "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(buffer.getvalue()[:keep])
    with pytest.raises(ValueError, match="does not decode"):
        load_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damage that it reads past
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "PPM", "IM", "DDS", "SGI"])
def test_any_damage_is_one_clear_error(tmp_path, kind):
    """Whatever Pillow raises for 40 files of each format in which some of the first bytes are others."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, kind)
    path, messages = tmp_path / "image", []
    for _ in range(40):
        damaged = np.frombuffer(buffer.getvalue(), dtype=np.uint8).copy()
        damaged[rng.integers(0, 60, 4)] = rng.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes())
        try:
            load_image(path)
        except ValueError as error:
            messages.append(str(error))
    assert messages
    assert [message for message in messages if not message.startswith(f"image {path}: ")] == []


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png: no such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="does not decode"):
        load_image(tmp_path)
