"""What the code may not do: run data as code, build lines for a shell, ask hosts on its own."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_architecture import FILES, TREES, calls, imported_names
from tests.test_command_line import settings_of

# Each runs text or bytes as code, or as a line of a shell.
FORBIDDEN_CALLS = re.compile(
    r"(builtins\.)?(eval|exec|compile|__import__)"
    r"|os\.(system|popen|spawn\w+|exec\w+)"
    r"|subprocess\.(getoutput|getstatusoutput)"
    r"|(\w*\.)*(pickle|marshal|shelve|dill|joblib)\.\w*(load|loads|open|Unpickler)"
    r"|yaml\.(load|load_all|unsafe_load|unsafe_load_all|full_load)"
    r"|torch\.hub\.\w+"
)
# Arguments that only this value makes safe; torch.load must name its own.
SAFE_ARGUMENTS = {
    "weights_only": "True",
    "trust_remote_code": "False",
    "allow_pickle": "False",
    "shell": "False",
}
UNPICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "shelve"}

# Who talks to others: a judge's server that the config names, and downloads that a recipe names.
NETWORK = {"http", "socket", "urllib.request", "requests", "httpx", "aiohttp", "ftplib", "smtplib"}
NETWORKED = {"cotgen_pl.rewards.remote", "cotgen_pl.downloads"}
# Addresses in code, but for docstrings: where hub ids lead, and what messages tell.
HOSTS = {
    "cotgen_pl.fetching": {"huggingface.co"},
    "tools.fetch": {"huggingface.co"},
    "cotgen_pl.rewards.aesthetic": {"github.com"},  # told in an error
    "cotgen_pl.rewards.remote": {"HOST", "..."},  # likewise
}
# Who reads the environment: names of variables that hold a key, the hub, what launchers say.
ENVIRONMENT = {
    "cotgen_pl.callbacks.preemption",
    "cotgen_pl.rewards.remote",
    "cotgen_pl.study.launch",  # hands it on to the runs that it starts
    "tools.fetch",
    "tools.main",
}
SECRET = re.compile(r"(^|_)(key|secret|password|credentials?|access_token|api_token)$")


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Calls that run data as code, as they are written."""
    found = []
    for function, call in calls(tree):
        values = {entry.arg: ast.unparse(entry.value) for entry in call.keywords}
        wrong = {n for n, safe in SAFE_ARGUMENTS.items() if values.get(n, safe) != safe}
        unnamed = function == "torch.load" and "weights_only" not in values
        if FORBIDDEN_CALLS.fullmatch(function) or wrong or unnamed:
            found.append(ast.unparse(call))
    return found


def addresses(tree: ast.AST) -> set[str]:
    """Hosts in texts of the code, docstrings left out."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]
    return {host for text in texts for host in re.findall(r"https?://([\w.-]+)", text)}


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_data_are_run_as_code(name):
    assert unsafe_calls(TREES[name]) == []
    roots = {imported.split(".")[0] for imported in imported_names(TREES[name])}
    assert not roots & UNPICKLERS


@pytest.mark.parametrize(
    ("line", "safe"),
    [
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=chosen)", False),
        ("torch.load(path, weights_only=True)", True),
        ("pickle.loads(content)", False),
        ("numpy.load(path, allow_pickle=True)", False),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", False),
        ("AutoModel.from_pretrained(path, trust_remote_code=False)", True),
        ("subprocess.run(line, shell=True)", False),
        ("subprocess.run(['git', 'log'], check=True)", True),
        ("os.system(line)", False),
        ("eval(text)", False),
        ("model.eval()", True),
        ("re.compile(text)", True),
        ("yaml.load(text)", False),
        ("yaml.safe_load(text)", True),
        ("torch.hub.load(repository, name)", False),
    ],
)
def test_what_runs_data_as_code_is_recognised(line, safe):
    assert (unsafe_calls(ast.parse(line)) == []) == safe


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_network_is_the_business_of_few(name):
    imported = set(imported_names(TREES[name]))
    roots = {i for i in imported if i in NETWORK or i.split(".")[0] in NETWORK}
    assert not roots or name in NETWORKED
    assert addresses(TREES[name]) <= HOSTS.get(name, set())


def test_hosts_are_recognised():
    tree = ast.parse('"""See http://a.org."""\nHUB = "https://b.org/x"\nHUB2 = f"http://{c}/"\n')
    assert addresses(tree) == {"b.org"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_environment_is_read_where_it_is_named(name):
    readers = {"os.environ", "os.getenv", "environ", "getenv"}
    nodes = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute | ast.Name)]
    read = {ast.unparse(node) for node in nodes} & readers
    assert not read or name in ENVIRONMENT


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_argument_takes_a_secret(name):
    """The config is saved whole: it holds the names of variables, and no keys."""
    functions = [n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef)]
    constructors = [f for f in functions if f.name == "__init__"]
    arguments = {a.arg for f in constructors for a in [*f.args.args, *f.args.kwonlyargs]}
    assert [argument for argument in arguments if SECRET.search(argument)] == []


@pytest.mark.parametrize(("argument", "secret"), [("api_key", True), ("api_key_variable", False)])
def test_arguments_that_would_take_a_secret_are_recognised(argument, secret):
    assert bool(SECRET.search(argument)) == secret


WATCH = """
import os, runpy, sys

def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        written = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        written = event in ("os.rename", "os.mkdir", "os.remove")
    if written:
        paths.append(os.path.abspath(os.fspath(arguments[1 if event == "os.rename" else 0])))

paths = []
listing = sys.argv.pop(1)
sys.addaudithook(note)
try:
    runpy.run_path("tools/main.py", run_name="__main__")
finally:
    recorded = list(paths)
    with open(listing, "w") as file:
        file.write("\\n".join(recorded))
"""


@pytest.mark.slow
def test_a_run_writes_into_its_folder_alone(tiny_janus, repository, tmp_path):
    """But for what libraries keep for themselves at home and in the temporary folder."""
    config, folder, listing = tmp_path / "run.yaml", tmp_path / "run", tmp_path / "listing"
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    for path in (home, scratch):
        path.mkdir()
    config.write_text(yaml.safe_dump(settings_of(tiny_janus, tmp_path)))
    command = [sys.executable, "-B", "-c", WATCH, str(listing), "fit", "--config", str(config)]
    environment = {"PYTHONPATH": str(repository), "HOME": str(home), "TMPDIR": str(scratch)}
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    written = {Path(line) for line in listing.read_text().splitlines()}
    own = {path for path in written if folder in (path, *path.parents)}
    assert len(own) > 20
    elsewhere = [p for p in written - own if not {home, scratch, Path("/dev")} & {p, *p.parents}]
    assert elsewhere == []
