"""The folder that a run leaves for transformers."""

import pytest
import torch
from transformers import JanusForConditionalGeneration, JanusProcessor

from cotgen_pl.callbacks.export import HuggingFaceExport
from cotgen_pl.policies.janus import JanusPolicy, LoraSettings
from tests.toys import fit, make_grpo, make_policy, sgd


def test_the_end_of_training_is_what_transformers_loads(tiny_janus, tmp_path):
    module = make_grpo(tiny_janus, optimizer=sgd(1.0))
    fit(module, tmp_path, HuggingFaceExport("model"))
    loaded = JanusForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float64)
    trained, start = module.policy.janus.state_dict(), make_policy(tiny_janus).load().janus
    assert all(torch.equal(w, trained[name]) for name, w in loaded.state_dict().items())
    assert any(not torch.equal(w, trained[name]) for name, w in start.state_dict().items())
    ids = JanusProcessor.from_pretrained(tmp_path / "model").tokenizer("a red circle")["input_ids"]
    assert ids == module.policy.processor.tokenizer("a red circle")["input_ids"]


def test_adapters_are_merged_or_kept_apart(tiny_janus, tmp_path):
    for merged in (True, False):
        policy = make_policy(tiny_janus, lora=LoraSettings(rank=2, alpha=4))
        folder = tmp_path / f"merged_{merged}"
        fit(make_grpo(tiny_janus, policy=policy), tmp_path, HuggingFaceExport(folder.name, merged))
        assert (folder / "config.json").exists() == merged
        assert (folder / "adapter_config.json").exists() != merged


def test_merging_into_quantised_weights_is_refused_before_they_load(
    tiny_janus, tmp_path, monkeypatch
):
    monkeypatch.setattr(JanusPolicy, "load", None)
    policy = JanusPolicy(str(tiny_janus), lora=LoraSettings(), quantize="4bit")
    with pytest.raises(ValueError, match="got true, and merging into 4bit weights is not exact"):
        fit(make_grpo(tiny_janus, policy=policy), tmp_path, HuggingFaceExport(merge_adapters=True))


def test_by_default_adapters_merge_unless_the_weights_are_quantised(tiny_janus):
    merged = []

    class Recorder(JanusPolicy):
        def check_export(self, *, merge_adapters):
            super().check_export(merge_adapters=merge_adapters)
            merged.append(merge_adapters)

    for quantize in (None, "4bit"):
        policy = Recorder(str(tiny_janus), lora=LoraSettings(), quantize=quantize)
        HuggingFaceExport().setup(None, make_grpo(tiny_janus, policy=policy), "fit")
    assert merged == [True, False]
