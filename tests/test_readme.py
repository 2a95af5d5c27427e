"""What the README and the manual in docs/ say exists, and the commands that they show work."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning import Callback

from cotgen_pl.callbacks.evaluation import Suite, SuiteEvaluation
from cotgen_pl.callbacks.pair_evaluation import PairEvaluation
from cotgen_pl.callbacks.rounds import IterativeRounds
from cotgen_pl.data.pairs import PairData
from cotgen_pl.interfaces import Prompt, Reward
from cotgen_pl.modules.dpo import DPOModule
from cotgen_pl.rewards.function import FunctionReward
from cotgen_pl.shapes.checkpoint import build_janus, build_tokenizer, save_janus
from tests.rewards.test_hps import write as write_small_hps
from tests.toys import Brightness, fit, make_grpo, make_policy, make_trainer, write_prompts
from tools.plan import GPUS, plan


@pytest.fixture
def readme(repository):
    return (repository / "README.md").read_text()


@pytest.fixture
def manual(repository):
    """All pages for readers, by their paths; docs/study is written by a program."""
    pages = ["README.md", "CONTRIBUTING.md", *sorted((repository / "docs").glob("*.md"))]
    return {repository / page: (repository / page).read_text() for page in pages}


def test_every_named_config_and_tool_exists(manual, repository):
    kinds = r"\.(?:yaml|jsonl|py|md|png|svg)"
    text = "\n".join(manual.values())
    # A reader's own files are called my_..., and {a,b} stands for several.
    named = set(
        re.findall(rf"\b((?:configs|tools|docs|cotgen_pl|tests)/(?!my_)[\w./-]+{kinds})\b", text)
    )
    assert len(named) >= 200
    assert [path for path in sorted(named) if not (repository / path).exists()] == []


def anchors_of(text: str) -> set[str]:
    """The fragments by which a page's headings are linked to."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_within_the_repository_leads_somewhere(manual):
    followed, broken = 0, []
    for page, text in manual.items():
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, fragment = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            followed += 1
            if not file.exists() or (fragment and fragment not in anchors_of(file.read_text())):
                broken.append(f"{page.name}: {target}")
    assert followed >= 50
    assert broken == []


def test_every_experiment_has_a_smoke_command(repository):
    page = (repository / "docs" / "configuration.md").read_text()
    experiments = sorted((repository / "configs").glob("*.yaml"))
    assert len(experiments) >= 10
    for path in experiments:
        assert f"--config configs/{path.name} --trainer.max_steps 2" in page


def commands_of(pages: Iterable[str]) -> list[str]:
    """The commands in blocks of bash, each on one line, without the comments behind them."""
    joined = [block.replace("\\\n", " ") for page in pages for block in blocks(page, "bash")]
    lines = [line.partition(" #")[0].strip() for block in joined for line in block.splitlines()]
    return sorted({" ".join(line.split()) for line in lines if line})


@pytest.mark.slow
def test_every_command_of_the_manual_has_settings_that_exist(
    manual, workplace, repository, capsys, monkeypatch
):
    """Read to the end and printed, not run: an unknown flag, class or piece is refused there."""
    import main

    (workplace / "cotgen_pl").symlink_to(repository / "cotgen_pl")
    shutil.copy("configs/dpo_hps.yaml", "configs/my_dpo.yaml")
    monkeypatch.setattr(sys, "argv", ["tools/main.py"])
    (workplace / "my_rewards.py").write_text("def redness(prompts, images, **columns): ...\n")
    commands = [
        command.partition("tools/main.py ")[2]
        for command in commands_of(manual.values())
        if "tools/main.py " in command
    ]
    settings = re.findall(r"`(--(?:model|trainer)\.\S+ [^`]+)`", manual[repository / "README.md"])
    assert len(commands) >= 40 and len(settings) >= 5
    commands += [f"fit --config configs/grpo_hps.yaml {setting}" for setting in settings]
    for command in commands:
        arguments = [word for word in shlex.split(command) if word not in ("--ckpt_path", "last")]
        arguments = [word for word in arguments if not word.endswith(".ckpt")]
        with pytest.raises(SystemExit) as ended:
            main.main([*arguments, "--print_config"])
        printed = capsys.readouterr()
        assert ended.value.code in (0, None), f"{command}\n{printed.err}"
        assert "class_path: cotgen_pl." in printed.out, command


def test_every_recipe_that_a_page_fetches_exists(manual, repository):
    fetched = [
        recipe
        for command in commands_of(manual.values())
        for recipe in command.partition("tools/fetch.py ")[2].split()
    ]
    assert len(fetched) >= 5
    known = {path.stem for path in (repository / "configs" / "recipes").glob("*.yaml")}
    assert set(fetched) <= known


def test_the_commands_that_ci_takes_from_the_readme_stand_there(readme, repository):
    lines = (repository / ".ci" / "run").read_text().splitlines()
    taken = [line.removesuffix("# README").strip() for line in lines if line.endswith("# README")]
    section = readme[readme.index("## Tests") :]
    assert taken == blocks(section, "bash")[0].splitlines()


def test_the_table_of_gpus_says_what_is_planned(readme, repository, monkeypatch):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = r"^\| (\d+) GB \| `(\S+)` \| .* \| ([\d.]+) of ([\d.]+) GB \(`(\w+)`\) \|$"
    rows = re.findall(row, readme, flags=re.MULTILINE)
    assert len(rows) == 4
    for size, config, peak, room, gpu in rows:
        [found] = plan([config, "--gpu", gpu])
        assert found["fits"] and GPUS[gpu].memory == float(size) * 1e9
        assert found["peak"] == pytest.approx(float(peak) * 1e9, abs=0.6e9)
        assert found["room"] == pytest.approx(float(room) * 1e9, abs=0.6e9)


def test_held_out_prompts_of_ones_own_are_read(readme, workplace):
    for name in ("my_held_out_prompts.txt", "my_other_prompts.txt"):
        (workplace / name).write_text("a green circle\n")
    section = readme[readme.index("## GRPO on your own") : readme.index("## DPO on your own")]
    (example,) = map(yaml.safe_load, blocks(section, "yaml"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    built = parser.instantiate_classes(parser.parse_object({"callback": example})).callback
    assert [suite.domain for suite in built.suites] == ["id", "ood"]


def glossary_of(page: str) -> list[re.Pattern[str]]:
    """The names in the table's first column; what stands in <...> is any word."""
    cells = [row.split("|")[1] for row in page.splitlines() if row.startswith("|")]
    names = re.findall("`([^`]+)`", " ".join(cells))
    return [re.compile(re.sub("<[a-z]+>", "[^/]+", re.escape(name))) for name in names]


def fit_dpo(tiny_janus: Path, folder: Path) -> dict[int, dict[str, float]]:
    """What one round of DPO logs, with the likelihood term and with held-out pairs."""
    folder.mkdir()
    files = [write_prompts(folder)]
    module = DPOModule(make_policy(tiny_janus), Brightness(), images_budget=16, likelihood_coef=0.1)
    callbacks = IterativeRounds(files=files), PairEvaluation(files)
    trainer = make_trainer(folder, *callbacks)
    trainer.fit(module, PairData(pairs_per_update=2))
    return trainer.logger.rows


@pytest.fixture(scope="module")
def logged(tiny_janus, tmp_path_factory):
    """All that three tiny runs log, which between them have every term that can be on."""
    folder = tmp_path_factory.mktemp("readme")
    suites = [
        Suite(domain, domain, [write_prompts(folder)], Brightness())
        for domain in ("id", "ood", "shift")
    ]
    names = set()
    for settings in (
        {"kl_coef": 0.1, "kl_penalty": 0.1, "updates_per_rollout": 2},
        {"kl_coef": 0.1, "logprobs": "conditional", "variant": "cispo", "clip_high": 5.0},
    ):
        evaluation = SuiteEvaluation(suites, leaks="warn", prompts_per_category=2)
        trainer = fit(make_grpo(tiny_janus, **settings), folder, evaluation)
        rows = trainer.logger.rows.values()
        names |= {name for row in rows for name in row} | trainer.progress_bar_metrics.keys()
    names |= {name for row in fit_dpo(tiny_janus, folder / "dpo").values() for name in row}
    return names - {"epoch", "step"}  # Lightning's own, the x axis


def test_every_logged_metric_is_in_the_glossary(repository, logged):
    glossary = glossary_of((repository / "docs" / "metrics.md").read_text())
    assert len(glossary) >= 50 and len(logged) >= 70
    unknown = [name for name in logged if not any(entry.fullmatch(name) for entry in glossary)]
    assert unknown == []


@pytest.fixture
def workplace(repository, tmp_path, monkeypatch):
    """A working directory with a copy of configs/ and prompts of a reader's own."""
    shutil.copytree(repository / "configs", tmp_path / "configs")
    (tmp_path / "my_prompts.txt").write_text("a red circle\ntwo cats\na blue square\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.syspath_prepend(str(repository / "tools"))
    return tmp_path


@pytest.fixture
def small_janus(tmp_path):
    """An untrained Janus of 16 x 16 px; its library's processor makes no picture below 14."""
    tokenizer = build_tokenizer(["a red circle", "two cats", "a blue square"], 300)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "codebook_size": 32}
    folder = tmp_path / "janus"
    save_janus(build_janus(tokenizer, **sizes, grid=4, vq_levels=3), tokenizer, folder)
    return folder


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


@pytest.mark.slow
def test_the_way_from_a_prompt_file_to_a_model_can_be_gone(
    readme, repository, workplace, small_janus
):
    import main

    section = readme[readme.index("## DPO on your own") : readme.index("## Rewards")]
    own, elsewhere = map(yaml.safe_load, blocks(section, "yaml"))
    page = (repository / "docs" / "pairs.md").read_text()
    (finished,) = map(yaml.safe_load, blocks(page, "yaml"))
    config = yaml.safe_load(Path("configs/dpo_hps.yaml").read_text())
    drawn, *callbacks = config["trainer"]["callbacks"]
    (rounds,) = own["trainer"]["callbacks"]
    assert rounds["init_args"].keys() == drawn["init_args"].keys()
    small = ["--model.init_args.policy.init_args.path", str(small_janus)]
    small += ["--model.init_args.reward.init_args.path", str(write_small_hps(workplace))]
    small += ["--model.init_args.images_budget", "128"]

    def run(folder: str, callbacks: list, *arguments: str, **changed: dict) -> Path:
        trainer = config["trainer"] | {"default_root_dir": folder, "callbacks": callbacks}
        written = yaml.safe_dump(config | {"trainer": trainer} | changed)
        Path("configs/my_dpo.yaml").write_text(written)
        main.main(["fit", "--config", "configs/my_dpo.yaml", *small, *arguments])
        assert (Path(folder) / "exported" / "model.safetensors").exists()
        return Path(folder)

    folder = run(own["trainer"]["default_root_dir"], [rounds, *callbacks])
    assert finished["data"]["init_args"]["path"] == str(folder / "rounds" / "0" / "pairs")
    run("runs/finished", callbacks, "--model.init_args.beta", "0.3", **finished)
    (code,) = blocks(page, "python")
    exec(code)
    assert Path("chosen.png").exists()
    source = elsewhere["data"]["init_args"]["source"]["path"]
    shutil.copytree(folder / "rounds" / "0" / "pairs" / "data", source)
    run("runs/elsewhere", callbacks, **elsewhere)


@pytest.fixture
def rewards_page(repository):
    return (repository / "docs" / "rewards.md").read_text()


def test_every_piece_of_a_reward_is_in_the_table(rewards_page, repository):
    rows = [row for row in rewards_page.splitlines() if row.startswith("| `")]
    named = {
        piece: row.split("`")[1] for row in rows for piece in re.findall(r"`(\S+)\.yaml`", row)
    }
    pieces = sorted((repository / "configs" / "rewards").glob("*.yaml"))
    assert len(pieces) >= 12
    for path in pieces:
        class_path = yaml.safe_load(path.read_text())["class_path"]
        assert class_path.endswith(f".{named[path.stem]}")
    assert set(named) - {"configs/grpo_shapes"} == {path.stem for path in pieces}


def test_examples_of_rewards_are_read(rewards_page, workplace):
    (workplace / "my_rewards.py").write_text(
        "def redness(prompts, images, **columns): ...\n"
        "def contrast(prompts, images, **columns): ...\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("JUDGE_KEY", "a-key")
        patch.delitem(sys.modules, "my_rewards", raising=False)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(Reward, "reward")
        examples = [yaml.safe_load(block) for block in blocks(rewards_page, "yaml")]
        built = [
            parser.instantiate_classes(parser.parse_object({"reward": example})).reward
            for example in examples
        ]
        sys.modules.pop("my_rewards")
    assert [type(reward).__name__ for reward in built] == [
        "Ensemble",
        "FunctionReward",
        "RemoteReward",
    ]


def test_a_reward_of_ten_lines_trains_by_the_command_beside_it(
    readme, workplace, repository, tiny_janus, monkeypatch
):
    import main

    monkeypatch.setattr(sys, "path", list(sys.path))
    (workplace / "cotgen_pl").symlink_to(repository / "cotgen_pl")
    section = readme[readme.index("### Write your own") : readme.index("## Evaluation and")]
    (code,), (command,) = blocks(section, "python"), blocks(section, "bash")
    assert len(code.strip().splitlines()) <= 10
    (workplace / "my_rewards.py").write_text(code)
    small = ["--model.init_args.policy.init_args.path", str(tiny_janus), "--trainer.max_steps", "1"]
    small += ["--model.init_args.images_per_update", "8", "--trainer.callbacks", "null"]
    main.main([*command.split()[2:], *small, "--trainer.enable_checkpointing", "false"])
    rows = Path("runs/redness/metrics.csv").read_text().splitlines()
    (value,) = (row.split(",")[3] for row in rows if ",train/rewards/redness/mean," in row)
    assert abs(float(value)) <= 1
    picture = torch.zeros(2, 3, 8, 8)
    picture[:, 0] = 1
    asked = [Prompt("a red cube"), Prompt("a blue cube")]
    reward = FunctionReward("my_rewards.redness")
    assert reward.score(picture, asked).total.tolist() == [1.0, -1.0]
    del sys.modules["my_rewards"]


def test_the_page_of_the_code_has_a_line_for_every_file_and_no_other(repository):
    page = (repository / "docs" / "code.md").read_text()
    named = re.findall(r"^((?:cotgen_pl|tools)/\S+\.py) {2,}\S", page, flags=re.MULTILINE)
    found = [
        path.relative_to(repository).as_posix()
        for folder in ("cotgen_pl", "tools")
        for path in (repository / folder).rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert len(found) >= 100
    assert sorted(named) == sorted(found)
