"""The folder that a run leaves for transformers."""

import torch
from transformers import JanusForConditionalGeneration, JanusProcessor

from cotgen_pl.callbacks.export import HuggingFaceExport
from cotgen_pl.policies.janus import LoraSettings
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
