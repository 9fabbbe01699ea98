"""The package: what is in the wheel and the sdist, and that it works where there is only that.

The long tests need a package registry: one runs tests with the oldest versions of the dependencies that
pyproject.toml allows, one installs into a Debian 12 made anew.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import clonefs
from tests.mounts.mount import DEADLINE_S, run
from tests.test_docs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = ("install", "mount.clonefs", "umount.clonefs", "clonefs-loop")


def build(source: Path, into: Path, *options: str) -> Path:
    """Build what the options say, or an sdist and from that a wheel; the directory."""
    words: tuple[str | Path, ...] = (
        "-m",
        "build",
        "--no-isolation",
        *options,
        "--outdir",
        into,
        source,
    )
    run(sys.executable, *words, deadline_s=10 * DEADLINE_S)
    return into


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the sdist, and the wheel that was made from it."""
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel."""
    [wheel] = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; its dependencies are those of the tests."""
    directory = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(directory, with_pip=False)
    pip = (sys.executable, "-m", "pip", "--python", directory / "bin/python")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return directory


def installed_run(environment: Path, *arguments: str | Path, **variables: str) -> str:
    """What the installed `clonefs` prints."""
    done = subprocess.run(
        [environment / "bin/clonefs", *arguments],
        env=os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")} | variables,
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert done.stderr == ""
    return done.stdout


def files_below(directory: Path) -> set[str]:
    """The files of the repository below a directory, but for what Python leaves there."""
    return {
        str(path.relative_to(ROOT))
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_has_the_program_and_what_the_machine_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        modes = {each.filename: each.external_attr >> 16 & 0o777 for each in file.infolist()}
    info, data = f"clonefs-{clonefs.__version__}.dist-info", f"clonefs-{clonefs.__version__}.data"
    expected = files_below(ROOT / "clonefs")
    expected |= {f"clonefs/mount_helpers/{name}" for name in SHIPPED}
    for directory in ("completion", "systemd"):
        found = files_below(ROOT / "mount-helpers" / directory)
        expected |= {each.replace("mount-helpers", "clonefs/mount_helpers") for each in found}
    for page in ("clonefs.1", "mount.clonefs.8"):
        expected.add(f"clonefs/mount_helpers/man/{page}")
        expected.add(f"{data}/data/share/man/man{page[-1]}/{page}")
    assert {name for name in modes if not name.startswith(info)} == expected
    assert "clonefs/py.typed" in expected
    assert {name for name, mode in modes.items() if mode & 0o111} == {
        f"clonefs/mount_helpers/{name}" for name in SHIPPED
    }


def test_the_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        info = f"clonefs-{clonefs.__version__}.dist-info"
        metadata = email.message_from_string(file.read(f"{info}/METADATA").decode())
        entry_points = file.read(f"{info}/entry_points.txt").decode().split()
    assert wheel.name == f"clonefs-{clonefs.__version__}-py3-none-any.whl"
    assert metadata["Version"] == clonefs.__version__
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    required = [each for each in metadata.get_all("Requires-Dist", []) if "extra" not in each]
    assert sorted(required) == sorted(PROJECT["dependencies"])
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    assert entry_points == ["[console_scripts]", "clonefs", "=", "clonefs.cli:main"]


def test_the_sdist_has_all_that_the_repository_has(dist: Path) -> None:
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    expected = {"pyproject.toml", "README.md"}
    for directory in ("clonefs", "docs", "mount-helpers", "tests"):
        expected |= files_below(ROOT / directory)
    assert names - {"PKG-INFO", ".gitignore"} == expected


def test_the_wheel_is_the_same_from_the_sdist_and_from_the_repository(
    wheel: Path, tmp_path: Path
) -> None:
    [other] = build(ROOT, tmp_path, "--wheel").iterdir()
    assert other.read_bytes() == wheel.read_bytes()


def test_the_installed_command(installed: Path) -> None:
    assert installed_run(installed, "--version") == f"clonefs {clonefs.__version__}\n"
    for shell in ("bash", "zsh", "fish"):
        script = ROOT / f"mount-helpers/completion/clonefs.{shell}"
        assert installed_run(installed, "completion", shell) == script.read_text()
    page = run("man", "--path", "-M", installed / "share/man", "clonefs")
    assert page == f"{installed}/share/man/man1/clonefs.1\n"


def test_the_package_alone_makes_it_part_of_the_machine(installed: Path, tmp_path: Path) -> None:
    machine = str(tmp_path)
    assert installed_run(installed, "install", DESTDIR=machine).startswith("install: ready")
    once = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()}
    assert (tmp_path / "usr/local/bin/clonefs").readlink() == installed / "bin/clonefs"
    assert os.access(tmp_path / "sbin/mount.clonefs", os.X_OK)
    for name in (
        "lib/systemd/system/clonefs@.service",
        "sbin/clonefs-loop",
        "share/man/man1/clonefs.1",
        "share/man/man8/mount.clonefs.8",
        "share/bash-completion/completions/clonefs",
        "share/zsh/site-functions/_clonefs",
    ):
        assert f"usr/local/{name}" in once
    assert "etc/fish/completions/clonefs.fish" in once
    # Called by the link that it has put there, it still finds itself.
    link = tmp_path / "link/bin/clonefs"
    link.parent.mkdir(parents=True)
    link.symlink_to(installed / "bin/clonefs")
    installed_run(tmp_path / "link", "install", "--prefix", "/opt", DESTDIR=machine)
    assert (tmp_path / "opt/bin/clonefs").readlink() == installed / "bin/clonefs"
    installed_run(installed, "install", "--uninstall", "--prefix", "/opt", DESTDIR=machine)
    installed_run(installed, "install", "--uninstall", DESTDIR=machine)
    assert {path for path in tmp_path.rglob("*") if not path.is_dir()} == {link}


def test_every_dependency_has_a_lowest_version() -> None:
    for requirement in PROJECT["dependencies"]:
        assert re.fullmatch(r"[a-z0-9]+>=[0-9.]+", requirement), requirement


# Long ------------------------------------------------------------------------------------------


BUILD_TOOLS = ("setuptools>=78.1.1", "setuptools_scm>=8", "Cython", "wheel", "pip")  # for pyfuse3


def download(into: Path, *what: str | Path) -> None:
    """Get packages from the registry, or skip the test where there is none."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", into, *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the package registry does not have it: {done.stderr.strip()[-300:]}")


@pytest.mark.long
def test_the_lowest_versions_of_the_dependencies(wheel: Path, tmp_path: Path) -> None:
    lowest = [each.replace(">=", "==") for each in PROJECT["dependencies"]]
    test = PROJECT["optional-dependencies"]["test"]
    tools = [each for each in test if each.startswith("pytest")]
    packages = tmp_path / "packages"
    download(packages, *lowest, *tools, *BUILD_TOOLS)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = (python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", packages)
    subprocess.run([*install, *lowest, *tools, wheel], check=True)
    # Not in the repository, where the package would be found that is being worked on.
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    where = ("-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "--basetemp", tmp_path / "bt")
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *where, *LOWEST_TESTS],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


LOWEST_TESTS = (
    *(f"tests/test_{name}.py" for name in ("extents", "units", "volume", "durable", "contents")),
    *(
        f"tests/test_{name}.py"
        for name in ("figures", "transitions", "recovery", "check", "stamps")
    ),
    *(f"tests/test_cli_{name}.py" for name in ("commands", "map", "mount", "status", "wait")),
    *(f"tests/test_cli_{name}.py" for name in ("watch", "completion")),
    *(f"tests/mounts/test_{name}.py" for name in ("control", "lu_files", "clones", "terminal")),
    *(f"tests/mounts/test_{name}.py" for name in ("protected_restore", "read_only", "remount")),
)


# In there are no services, and nothing of it outlives the namespace of its mounts.
ENTER = """
set -e
cd "$1"
shift
mount -t proc proc proc
mount -t tmpfs tmpfs dev
for device in null zero random urandom fuse; do
    touch dev/$device
    mount --bind /dev/$device dev/$device
done
ln -s /proc/self/fd dev/fd
exec chroot . "$@"
"""

# python3-venv comes with pipx.
DEBIAN_PACKAGES = "pipx python3-dev gcc libc6-dev pkgconf libfuse3-dev fuse3 man-db mount"

USE_IT = """
set -ex
export HOME=/root PIP_NO_INDEX=1 PIP_FIND_LINKS=/packages PIPX_HOME=/opt/pipx PIPX_BIN_DIR=/opt/pipx/bin
cd /srv
python3 -m venv venv
venv/bin/pip install --quiet clonefs
venv/bin/clonefs --version
pipx install /packages/clonefs-*.whl
PATH=$PATH:/opt/pipx/bin
mkdir mnt
clonefs format meta
clonefs mount meta mnt
clonefs add-group mnt payroll $PWD/production.img --size 8M
clonefs add-clone mnt/payroll nightly $PWD/nightly.img
clonefs wait mnt/payroll/nightly
clonefs fracture mnt/payroll/nightly
clonefs restore --wait mnt/payroll/nightly
clonefs umount mnt
clonefs install
mount -t clonefs meta mnt
/usr/local/bin/clonefs status mnt
umount mnt
man --path clonefs mount.clonefs
clonefs install --uninstall
"""


def entered(root: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in the Debian below `root`, in a namespace of mounts that ends with it."""
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, "sh", root, *command],
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"} | INSIDE,
        capture_output=True,
        text=True,
        check=False,
    )


INSIDE = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


@pytest.mark.long
def test_a_clean_debian_12(wheel: Path, tmp_path: Path) -> None:
    root, packages = tmp_path / "debian", tmp_path / "packages"
    download(packages, wheel, *BUILD_TOOLS)
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", root],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no Debian can be made here: {made.stdout[-300:]}")
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    install = "apt-get -qq update && apt-get -qq -y --no-install-recommends install"
    done = entered(root, "sh", "-c", f"{install} {DEBIAN_PACKAGES}")
    assert done.returncode == 0, done.stderr
    shutil.copytree(packages, root / "packages")
    shutil.copy(wheel, root / "packages")
    done = entered(root, "sh", "-c", USE_IT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"clonefs {clonefs.__version__}\n" in done.stdout
    assert "payroll/nightly  fractured" in done.stdout
    assert "/usr/local/man/man1/clonefs.1" in done.stdout
