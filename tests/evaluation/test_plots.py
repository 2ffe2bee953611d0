"""The pictures: what is chosen, that files are whole, and that marks land where they should."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlblocks.errors import UserError
from vlblocks.evaluation import GroundingExample, plot_curves, plot_grounding, plots, shared_codes


def example(codes=4, words=("a", "red", "circle"), side=4):
    patches, tokens = np.full((codes, side, side), 0.1), np.full((codes, len(words)), 0.1)
    patches[1, 0, 0], tokens[1, 1] = 0.9, 0.9  # fires at one place on both sides
    patches[2], tokens[2] = 0.99, 0.99  # fires everywhere
    patches[3, 0, 0] = 0.9  # fires in the image only
    image = np.full((32, 32, 3), 255, np.uint8)
    return GroundingExample(image, list(words), patches, tokens, np.arange(codes) + 40)


def test_codes_that_fire_in_places_on_both_sides_come_first():
    assert shared_codes(example(), 2)[0] == 1


def test_curves_draw_one_titled_panel_per_loss(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    history = {
        "pairs/masked_tokens": [(step, 1 / step) for step in range(1, 200)],
        "val/text_to_image_r1": [(50, 0.1), (100, float("nan")), (150, 0.3)],
    }
    plot_curves(history, tmp_path / "unused.png")
    panels = figures[0].axes
    assert [panel.get_title(loc="left") for panel in panels] == ["pairs · masked tokens", "val · text to image r1"]
    raw, smooth = panels[0].get_lines()
    assert raw.get_ydata().tolist() == [1 / step for step in range(1, 200)]
    # A falling curve's running mean lags above it, and both start at the same value.
    assert (smooth.get_ydata()[1:] > raw.get_ydata()[1:]).all() and smooth.get_ydata()[0] == 1
    assert np.isnan(panels[1].get_lines()[0].get_ydata()).tolist() == [False, True, False]


def test_curves_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run" / "curves.png"
    plot_curves({"loss": [(1, 2.0), (2, 1.0)]}, path)
    first = path.read_bytes()
    assert Image.open(path).format == "PNG"

    def broken(self, file, **_):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(plots.Figure, "savefig", broken)
    with pytest.raises(OSError, match="no space"):
        plot_curves({"loss": [(1, 2.0)]}, path)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]
    with pytest.raises(UserError, match="no curves"):
        plot_curves({}, path)


def test_grounding_shows_the_heat_and_the_words_of_the_chosen_codes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plot_grounding(tmp_path / "unused.png", [example(), example(words=["$5", "b", "c", "d"])], codes_per_pair=2)
    titles = [panel.get_title() for panel in figures[0].axes]
    assert titles[:5] == ["pair 1", "code 41", "code 41", "code 40", "code 40"]
    heat = figures[0].axes[1].images[1].get_array()
    assert heat[0, 0] == 1 and heat.sum() == 1  # one patch of sixteen
    bars = [bar.get_width() for bar in figures[0].axes[2].containers[1]]
    assert bars == [0.1, 0.9, 0.1]
    assert [label.get_text() for label in figures[0].axes[2].get_yticklabels()] == ["a", "red", "circle"]


def test_grounding_file_from_tensors_and_its_errors(tmp_path):
    item = example()
    tensors = GroundingExample(*(torch.as_tensor(part) if not isinstance(part, list) else part for part in item))
    plot_grounding(tmp_path / "grounding.png", [tensors], title="A title")
    assert min(Image.open(tmp_path / "grounding.png").size) > 200
    with pytest.raises(UserError, match=r"items\[0\]: expected patch_activations"):
        plot_grounding(tmp_path / "x.png", [item._replace(words=["one"])])
    with pytest.raises(UserError, match=r"items\[0\].image"):
        plot_grounding(tmp_path / "x.png", [item._replace(image=item.image[..., 0])])
    with pytest.raises(UserError, match="no pairs"):
        plot_grounding(tmp_path / "x.png", [])
