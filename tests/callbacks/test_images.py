"""Pictures of `predict` as files."""

import json
from pathlib import Path

import torch
from PIL import Image

from cotgen_pl.callbacks.images import ImageWriter
from cotgen_pl.data.prompts import PromptData
from tests.toys import TEXTS, make_grpo, make_trainer, write_prompts


def predict(tiny_janus, folder, **arguments):
    folder.mkdir()
    trainer = make_trainer(folder, ImageWriter(**arguments))
    data = PromptData([write_prompts(folder)], predict_batch_size=3)
    pictures = trainer.predict(make_grpo(tiny_janus), data)
    return torch.cat(pictures), trainer


def test_each_prompt_has_a_picture_and_a_row(tiny_janus, tmp_path):
    pictures, trainer = predict(tiny_janus, tmp_path / "a")
    folder = Path(trainer.default_root_dir) / "images"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(TEXTS)
    for row, picture in zip(rows, pictures, strict=True):
        assert Image.open(folder / row["file"]).size == tuple(picture.shape[:0:-1])


def test_greedy_pictures_do_not_depend_on_noise(tiny_janus, tmp_path):
    greedy, _ = predict(tiny_janus, tmp_path / "a", top_k=1)
    drawn, _ = predict(tiny_janus, tmp_path / "b")
    again, _ = predict(tiny_janus, tmp_path / "c", top_k=1)
    assert torch.equal(greedy, again)
    assert not torch.equal(greedy, drawn)
