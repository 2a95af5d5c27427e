"""The made-up study, written once for all tests that only read it."""

import pytest

from tests.study.made_up import make_study, read_all


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    return read_all(make_study(tmp_path_factory.mktemp("study")))


@pytest.fixture(scope="session")
def main(records):
    return records.study.groups["main"]
