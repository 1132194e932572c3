"""What is shipped: the files and metadata of the sdist and the wheel, and what the package imports.

Both are built from a copy of the files that git tracks, or would: as from a fresh clone, without a network.
"""

from __future__ import annotations

import email
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import twloss
from tests.support.patience import SECONDS

ROOT = Path(__file__).parents[2]
# What the sdist has of the repository. The backend adds .gitignore, which tells it what to leave out, and PKG-INFO.
SHIPPED_FOLDERS = (".ci", "twloss", "tests", "benchmarks", "docs", "examples")
SHIPPED_FILES = {
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"),
    *(".pre-commit-config.yaml", "mkdocs.yml", "pyproject.toml"),
    *("constraints.txt", "constraints-frameworks.txt", "constraints-torchrec.txt"),
}
ADDED = {".gitignore", "PKG-INFO"}
EXTRAS = {
    "bench",
    "demo",
    "dev",
    "docs",
    "frameworks",
    "hugging-face",
    "mlflow",
    "ray",
    "test",
    "torchrec",
    "visual",
    "wandb",
}


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of_the_repository() -> set[str]:
    """Those that git tracks, or would; in an unpacked sdist, which has no git, those that it is to have."""
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    else:
        found = [path for folder in SHIPPED_FOLDERS for path in (ROOT / folder).rglob("*")]
        listed = [path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts]
        listed += [*SHIPPED_FILES, ".gitignore"]
    return {name for name in listed if (ROOT / name).is_file()}


class Archives:
    """An sdist, the wheel that is built from it, and the files that the sdist was built from."""

    def __init__(self, folder: Path) -> None:
        self.source = files_of_the_repository()
        self.clone, dist = folder / "clone", folder / "dist"
        for name in self.source:
            (self.clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.clone / name)
        # What work leaves behind, and a build must not pick up.
        for stray in ("twloss/__pycache__/batch.pyc", "build/lib/twloss/old.py", "tests/.pytest_cache/README.md"):
            (self.clone / stray).parent.mkdir(parents=True, exist_ok=True)
            (self.clone / stray).touch()
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), cwd=self.clone)
        (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
        self.wheel_name, self.sdist_name = wheel.name, sdist.name
        with tarfile.open(sdist) as tar:
            members = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
            self.sdist = {name: data.read() for name, data in members.items() if data is not None}
        with zipfile.ZipFile(wheel) as packed:
            self.wheel = {name: packed.read(name) for name in packed.namelist()}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    return Archives(tmp_path_factory.mktemp("packaging"))


@pytest.mark.exhaustive
def test_the_names_have_the_version(archives: Archives) -> None:
    assert archives.sdist_name == f"twloss-{twloss.__version__}.tar.gz"
    assert archives.wheel_name == f"twloss-{twloss.__version__}-py3-none-any.whl"


@pytest.mark.exhaustive
def test_the_wheel_is_the_package_and_its_metadata(archives: Archives) -> None:
    package = {name for name in archives.source if name.startswith("twloss/")}
    assert {Path(name).suffix for name in package} == {".py", ".typed"}
    about = f"twloss-{twloss.__version__}.dist-info"
    files = {f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert set(archives.wheel) == package | files
    assert "twloss/py.typed" in archives.wheel
    assert archives.wheel[f"{about}/licenses/LICENSE"] == (archives.clone / "LICENSE").read_bytes()


@pytest.mark.exhaustive
def test_the_sdist_is_what_git_has_of_the_shipped_folders(archives: Archives) -> None:
    shipped = {name for name in archives.source if name in SHIPPED_FILES or name.partition("/")[0] in SHIPPED_FOLDERS}
    assert {name.partition("/")[0] for name in shipped} == {*SHIPPED_FILES, *SHIPPED_FOLDERS}
    prefix = f"twloss-{twloss.__version__}/"
    assert set(archives.sdist) == {prefix + name for name in shipped | ADDED}
    for name in shipped:
        assert archives.sdist[prefix + name] == (archives.clone / name).read_bytes()


@pytest.mark.exhaustive
def test_the_wheel_from_the_sdist_has_the_files_of_the_repository(archives: Archives) -> None:
    """``python -m build`` makes the wheel from the sdist."""
    for name in archives.source:
        if name.startswith("twloss/"):
            assert archives.wheel[name] == (archives.clone / name).read_bytes()


@pytest.mark.exhaustive
def test_the_metadata(archives: Archives) -> None:
    metadata = email.message_from_bytes(archives.wheel[f"twloss-{twloss.__version__}.dist-info/METADATA"])
    assert metadata["Name"] == "twloss"
    assert metadata["Version"] == twloss.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    required = metadata.get_all("Requires-Dist", [])
    always = [requirement for requirement in required if "extra ==" not in requirement]
    assert sorted(always) == ["torch>=2.6", "torchmetrics<2,>=1.0.3"]
    for extra in EXTRAS:
        assert any(f"extra == '{extra}'" in requirement for requirement in required)
    assert metadata.get_payload(decode=True) == (archives.clone / "README.md").read_bytes()


# torchmetrics imports some of what is optional, so a look at what has been imported would not tell who did it.
LIST_IMPORTS = """
import builtins, json, sys

import torch, torch.utils.module_tracker, torchmetrics

before, by_the_package, plain_import = set(sys.modules), set(), builtins.__import__


def watched_import(name, globals=None, *arguments, **keywords):
    if ((globals or {}).get("__name__") or "").partition(".")[0] == "twloss":
        by_the_package.add(name)
    return plain_import(name, globals, *arguments, **keywords)


builtins.__import__ = watched_import
import twloss

known = set(sys.stdlib_module_names) | {"twloss"}
top = lambda names: sorted({name.partition(".")[0] for name in names} - known)
print(json.dumps([top(by_the_package), top(set(sys.modules) - before)]))
"""


def test_importing_the_package_imports_torch_and_torchmetrics_alone() -> None:
    by_the_package, loaded_after_torch = json.loads(run(sys.executable, "-W", "error", "-c", LIST_IMPORTS))
    assert by_the_package == ["torch", "torchmetrics"]
    assert loaded_after_torch == []
