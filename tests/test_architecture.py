"""The house rules that a machine can read: layers, lightness, file length, printing."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "cotgen_pl"
FEWEST_PACKAGE_FILES = 35
FEWEST_TOOLS = 2
FEWEST_DATA_FILES = 18
LONGEST_FILE = 400

LAYERS = {
    "interfaces": 0,
    "files": 0,
    "products": 0,
    "rules": 0,
    "sharding": 0,
    "adapters": 1,
    "best_of_n": 1,
    "checkpoints": 1,
    "compiling": 1,
    "decoding": 1,
    "descriptions": 1,
    "downloads": 1,
    "losses": 1,
    "official_results": 1,
    "origin": 1,
    "phrases": 1,
    "picture_tokens": 1,
    "pixels": 1,
    "prompt_ids": 1,
    "sampling": 1,
    "scoring": 1,
    "shapes": 1,
    "sharded_checkpoints": 1,
    "understanding": 1,
    "weights": 1,
    "conversion": 2,
    "fetching": 2,
    "layouts": 2,
    "leaks": 2,
    "metrics": 2,
    "monitors": 2,
    "optimizers": 2,
    "pairs": 2,
    "planning": 2,
    "policies": 2,
    "rewards": 2,
    "run_checkpoints": 2,
    "strategies": 2,
    "data": 3,
    "modules": 3,
    "bench": 4,
    "evaluation": 4,
    "callbacks": 5,
    "study": 6,
    "tools": 7,
}
SHARED_INSIDE_THEIR_FOLDER = {
    "cotgen_pl.callbacks.base",
    "cotgen_pl.callbacks.evaluation",
    "cotgen_pl.callbacks.pair_building",
    "cotgen_pl.evaluation.suites",
    "cotgen_pl.evaluation.verdicts",
    "cotgen_pl.modules.base",
    "cotgen_pl.modules.finite",
    "cotgen_pl.modules.grpo_settings",
    "cotgen_pl.modules.micro_batches",
    "cotgen_pl.modules.offline",
    "cotgen_pl.modules.parallel",
    "cotgen_pl.pairs.rows",
    "cotgen_pl.rewards.base",
    "cotgen_pl.rewards.compbench_prompts",
    "cotgen_pl.rewards.depth",
    "cotgen_pl.rewards.detectors",
    "cotgen_pl.rewards.language_judges",
    "cotgen_pl.rewards.open_clip_models",
    "cotgen_pl.rewards.open_vocabulary",
    "cotgen_pl.rewards.perception",
    "cotgen_pl.rewards.sanity",
    "tools.main",
    "tools.plan",
}
FOLDERS_OPEN_INSIDE = {
    "bench",
    "conversion",
    "data",
    "decoding",
    "losses",
    "planning",
    "rules",
    "shapes",
    "study",
}
SEEN_THROUGH_INTERFACES = {"policies", "rewards"}
HEAVY = {
    "bitsandbytes",
    "lightning",
    "open_clip",
    "peft",
    "pytorch_lightning",
    "timm",
    "transformers",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PACKAGE_FILES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
TOOLS = {module_name(path): path for path in sorted((ROOT / "tools").rglob("*.py"))}
FILES = PACKAGE_FILES | TOOLS
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}


def area(module: str) -> str:
    """The key of LAYERS that a module belongs to: `cotgen_pl.rewards.hps` is in `rewards`."""
    first, *rest = module.split(".")
    found = first if first == "tools" else rest[0]
    if found not in LAYERS:
        raise ValueError(f"{module}: no layer for {found!r}; add it to LAYERS in {__file__}")
    return found


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every imported module of a file, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports absolutely"
            assert node.module
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in FILES else node.module


def inner_imports(tree: ast.AST) -> set[str]:
    """The imports of our own; a script may name another script without its folder."""
    names = {f"tools.{name}" if f"tools.{name}" in TOOLS else name for name in imported_names(tree)}
    return {name for name in names if name.split(".")[0] in {PACKAGE, "tools"}}


def breach(source: str, target: str) -> str | None:
    """Why `source` may not import `target`, or None where it may."""
    if target == PACKAGE:  # its own imports have a test of their own
        return None if LAYERS[area(source)] > 1 else "the package's __init__ stands above it"
    below, above = area(target), area(source)
    if LAYERS[below] > LAYERS[above]:
        return f"{below} is a higher layer than {above}"
    if LAYERS[below] == LAYERS[above]:
        return None if is_open_inside(above, below, target) else f"{target} is in the same layer"
    if below in SEEN_THROUGH_INTERFACES and above != "tools":
        return f"{above} sees {below} through cotgen_pl.interfaces only"
    return None


def is_open_inside(above: str, below: str, target: str) -> bool:
    """Whether a folder lets its own files import `target`."""
    return above == below and (above in FOLDERS_OPEN_INSIDE or target in SHARED_INSIDE_THEIR_FOLDER)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file with its function as written: `print`, `torch.load`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def run_python(script: str, *arguments: str) -> str:
    """Run a script in a new interpreter at the root of the checkout; gives its output."""
    command = [sys.executable, "-c", script, *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_finds_the_files():
    assert len(PACKAGE_FILES) >= FEWEST_PACKAGE_FILES
    assert len(TOOLS) >= FEWEST_TOOLS


@pytest.mark.parametrize("source", sorted(set(FILES) - {PACKAGE}))
def test_imports_point_down_the_layers(source):
    breaches = {target: breach(source, target) for target in inner_imports(TREES[source])}
    assert not {target: why for target, why in breaches.items() if why}


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("cotgen_pl.interfaces", "cotgen_pl.losses", "higher layer"),
        ("cotgen_pl.losses", "cotgen_pl.sampling", "same layer"),
        ("cotgen_pl.losses", "cotgen_pl", "stands above"),
        ("cotgen_pl.losses.grpo", "cotgen_pl.pairs.selection", "higher layer"),
        ("cotgen_pl.shapes.judge", "cotgen_pl.rewards.hps", "higher layer"),
        ("cotgen_pl.policies.janus", "cotgen_pl.rewards.hps", "same layer"),
        ("cotgen_pl.rewards.hps", "cotgen_pl.rewards.ensemble", "same layer"),
        ("cotgen_pl.modules.grpo", "cotgen_pl.modules.dpo", "same layer"),
        ("cotgen_pl.data.prompts", "cotgen_pl.modules.base", "same layer"),
        ("cotgen_pl.modules.grpo", "cotgen_pl.policies.janus", "through cotgen_pl.interfaces"),
        ("cotgen_pl.data.prompts", "cotgen_pl.rewards", "through cotgen_pl.interfaces"),
        ("cotgen_pl.callbacks.rounds", "cotgen_pl.rewards.hps", "through cotgen_pl.interfaces"),
        ("cotgen_pl.callbacks.rounds", "cotgen_pl.callbacks.samples", "same layer"),
        ("cotgen_pl.evaluation.tables", "cotgen_pl.callbacks.evaluation", "higher layer"),
        ("cotgen_pl.study", "tools.main", "higher layer"),
        ("tools.study", "tools.build_shapes", "same layer"),
    ],
)
def test_layer_rules_refuse(source, target, reason):
    assert reason in (breach(source, target) or "")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("cotgen_pl.losses.grpo", "cotgen_pl.losses.kl"),
        ("cotgen_pl.pairs.selection", "cotgen_pl.losses"),
        ("cotgen_pl.shapes.judge", "cotgen_pl.shapes.grammar"),
        ("cotgen_pl.rewards.geneval", "cotgen_pl.rewards.perception"),
        ("cotgen_pl.rewards.shapes_oracle", "cotgen_pl.shapes.judge"),
        ("cotgen_pl.modules.grpo", "cotgen_pl.modules.base"),
        ("cotgen_pl.data.pairs", "cotgen_pl.data.prompts"),
        ("cotgen_pl.callbacks.rounds", "cotgen_pl.modules.base"),
        ("cotgen_pl.callbacks.evaluation", "cotgen_pl.evaluation.suites"),
        ("tools.build_shapes", "cotgen_pl.policies.janus"),
        ("tools.main", "cotgen_pl"),
        ("tools.probe", "tools.main"),
    ],
)
def test_layer_rules_allow(source, target):
    assert breach(source, target) is None


def test_imports_are_read_wherever_they_stand():
    tree = ast.parse(
        "import torch\n"
        "def late():\n"
        "    from cotgen_pl import losses\n"
        "    from cotgen_pl.losses import grpo_loss\n"
    )
    assert list(imported_names(tree)) == ["torch", "cotgen_pl.losses", "cotgen_pl.losses"]


def test_package_names_interfaces_losses_and_sampling_only():
    assert inner_imports(TREES[PACKAGE]) == {
        "cotgen_pl.interfaces",
        "cotgen_pl.losses",
        "cotgen_pl.sampling",
    }


@pytest.mark.parametrize("folder", ["policies", "rewards"])
def test_policies_and_rewards_are_imported_by_path(folder):
    assert (ROOT / PACKAGE / folder / "__init__.py").read_text() == ""


def test_importing_the_package_is_light():
    script = "import sys, cotgen_pl; print(*sys.modules)"
    loaded = set(run_python(script).split())
    assert "cotgen_pl.losses" in loaded
    assert not loaded & HEAVY


def test_every_file_imports_by_itself():
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    for loaded in [known for known in sys.modules if known.startswith('cotgen_pl')]:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
        "    print('imported', name)\n"
    )
    output = run_python(script, *FILES)
    assert re.findall(r"^imported (\S+)$", output, re.MULTILINE) == list(FILES)


def test_every_data_file_is_packaged():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"][PACKAGE]
    packaged = {path for pattern in patterns for path in (ROOT / PACKAGE).glob(pattern)}
    files = {path for path in (ROOT / PACKAGE).rglob("*") if path.is_file()}
    data = {path for path in files if path.suffix != ".py" and path.parent.name != "__pycache__"}
    assert len(data) >= FEWEST_DATA_FILES
    assert data <= packaged


def test_every_library_is_a_declared_dependency():
    requirements = PYPROJECT["project"]["dependencies"]
    declared = {normalised(requirement) for requirement in requirements}
    providers = importlib.metadata.packages_distributions()
    roots = {name.split(".")[0] for tree in TREES.values() for name in imported_names(tree)}
    libraries = roots - set(sys.stdlib_module_names) - {PACKAGE, "tools"}
    libraries -= {name.removeprefix("tools.") for name in TOOLS}
    assert "torch" in libraries
    missing = {
        library
        for library in libraries
        if not declared & {normalised(provider) for provider in providers.get(library, [library])}
    }
    assert not missing, "declare them in pyproject.toml with the feature that needs them"


def normalised(requirement: str) -> str:
    """The bare name of a requirement, as package indexes compare it."""
    name = re.match(r"[\w.-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


@pytest.mark.parametrize("name", sorted(PACKAGE_FILES))
def test_package_does_not_print(name):
    lines = [call.lineno for function, call in calls(TREES[name]) if function == "print"]
    assert not lines, "print in scripts only; the package logs or writes to a stream it is given"


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_are_short(name):
    assert len(FILES[name].read_text().splitlines()) < LONGEST_FILE
