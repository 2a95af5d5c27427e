"""What the README says exists."""

import re

import pytest


@pytest.fixture
def readme(repository):
    return (repository / "README.md").read_text()


def test_every_named_config_and_tool_exists(readme, repository):
    named = set(
        re.findall(r"\b((?:configs|tools|docs)/[\w./-]+\.(?:yaml|jsonl|py|md|png))\b", readme)
    )
    assert len(named) >= 8
    assert [path for path in sorted(named) if not (repository / path).exists()] == []


def test_every_experiment_has_a_smoke_command(readme, repository):
    experiments = sorted((repository / "configs").glob("*.yaml"))
    assert len(experiments) >= 4
    for path in experiments:
        assert f"--config configs/{path.name} --trainer.max_steps 2" in readme


def test_every_logged_metric_of_the_module_is_in_the_glossary(readme):
    from cotgen_pl.metrics import MAXIMA, MINIMA

    for metric in MAXIMA | MINIMA:
        first, last = metric.rsplit("/", 1)
        assert re.search(rf"{re.escape(first.split('/')[-1])}", readme), metric
        assert last in readme, metric


def test_the_file_tree_names_every_module(readme, repository):
    tree = readme[readme.index("## The code") :]
    files = [p.name for p in (repository / "cotgen_pl").rglob("*.py") if p.name != "__init__.py"]
    assert len(files) >= 25
    assert [name for name in files if name not in tree] == []
