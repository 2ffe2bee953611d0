"""The package as a user gets it: built, installed into a fresh environment, imported."""

import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDERS = {"vlblocks": "vlblocks", "kernels/vlblocks_kernels": "vlblocks_kernels", "recipes": "vlblocks_recipes"}


def modules(root: Path) -> set[str]:
    """Every source file under its path in the installed package."""
    return {
        "/".join([package, *path.relative_to(root / folder).parts])
        for folder, package in FOLDERS.items()
        for path in (root / folder).rglob("*.py")
    }


def run(*command: object, **keywords) -> str:
    """Standard output of a command that must succeed, started outside the repository."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **keywords)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_package_list_equals_the_folders(root):
    listed = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {
        ".".join([package, *path.relative_to(root / folder).parts])
        for folder, package in FOLDERS.items()
        for path in [root / folder, *(root / folder).rglob("*")]
        if path.is_dir() and any(path.glob("*.py"))
    }
    assert sorted(listed) == sorted(folders)
    for name in listed:
        folder = next(f for f, p in FOLDERS.items() if name == p or name.startswith(f"{p}."))
        path = root.joinpath(folder, *name.removeprefix(FOLDERS[folder]).strip(".").split("."))
        assert (path / "__init__.py").is_file(), f"{name} has no __init__.py"


def test_the_folder_of_kernels_is_no_package(root):
    assert not (root / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def built(root, tmp_path_factory) -> tuple[Path, Path]:
    """An sdist of a copy of the repository (building writes into it), and the wheel that is built from that sdist."""
    work = tmp_path_factory.mktemp("build")
    waste = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache", "results")
    for name in ("vlblocks", "kernels", "recipes", "tests", "benchmarks"):
        shutil.copytree(root / name, work / "copy" / name, ignore=waste)
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "MANIFEST.in"):
        shutil.copy(root / name, work / "copy" / name)
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(work)!r}))"
    sdist = work / run(sys.executable, "-c", code, cwd=work / "copy").split()[-1]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", work, sdist, cwd=work)
    return sdist, next(work.glob("*.whl"))


def test_the_sdist_holds_sources_tests_and_papers(built, root):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {str(path.relative_to(root)) for folder in FOLDERS for path in (root / folder).rglob("*.py")}
    wanted |= {str(path.relative_to(root)) for path in (root / "tests").rglob("*.py")}
    wanted |= {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "vlblocks/py.typed"}
    assert wanted - names == set()


def test_the_wheel_holds_every_module_and_nothing_else_at_its_top(built, root):
    names = set(zipfile.ZipFile(built[1]).namelist())
    assert {name for name in names if name.endswith(".py")} == modules(root)
    assert {"vlblocks/py.typed", "vlblocks_kernels/py.typed"} <= names
    top = {name.split("/")[0] for name in names}
    assert top - {name for name in top if name.endswith(".dist-info")} == set(FOLDERS.values())
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_imports_in_a_fresh_environment(built, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", built[1], cwd=tmp_path)
    # `--system-site-packages` would show the base interpreter's packages, not those of the environment that runs
    # this test. A path file shows those, and the editable installs among them stay off: theirs are not read.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    code = """
        import importlib, pkgutil, sys
        import vlblocks, vlblocks_kernels, vlblocks_recipes.unimo2
        for package in (vlblocks, vlblocks_kernels, vlblocks_recipes):
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                assert sys.prefix in importlib.import_module(module.name).__file__, module
            print(package.__file__)
    """
    files = run(python, "-I", "-c", textwrap.dedent(code), cwd=tmp_path).split()
    assert len(files) == 3 and all(Path(file).is_relative_to(tmp_path / "fresh") for file in files)


BLOCKER = """
    import importlib, pkgutil, sys

    BLOCKED = {"tyro", "torchdata", "timm", "accelerate", "tensorboard", "matplotlib", "tokenizers"}

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in BLOCKED:
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocker())
"""


def test_kernels_and_ops_import_without_the_training_dependencies(tmp_path):
    code = """
        import vlblocks_kernels, vlblocks.ops
        for package in (vlblocks_kernels, vlblocks.ops):
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
        assert "torch" in sys.modules and not BLOCKED & set(sys.modules)
        try:
            importlib.import_module("tyro")
        except ImportError:
            print("blocked")
    """
    assert run(sys.executable, "-c", textwrap.dedent(BLOCKER) + textwrap.dedent(code), cwd=tmp_path) == "blocked\n"


def test_the_bare_import_is_light(tmp_path):
    code = "import sys; before = set(sys.modules); import vlblocks; print(*(set(sys.modules) - before))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).split() == ["vlblocks"]


def test_ci_is_an_executable_script_with_the_readmes_command(root):
    script = root / ".ci" / "run"
    assert os.access(script, os.X_OK)
    run("bash", "-n", script)
    command = "pip install -e '.[test]' && python -m pytest"
    assert command in script.read_text() and command in (root / "README.md").read_text()
