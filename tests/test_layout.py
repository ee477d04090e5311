"""Guards for the source root, which shares its name with the stdlib module `platform`, and for the wheel."""

import platform
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "platform"


def test_source_root_is_not_a_package() -> None:
    assert not (SOURCE / "__init__.py").exists()


def test_source_root_holds_one_package_only() -> None:
    assert {p.name for p in SOURCE.iterdir() if p.name != "__pycache__"} == {"bessemer"}


def test_modules_live_in_regular_packages_and_shadow_nothing() -> None:
    modules = list((SOURCE / "bessemer").rglob("*.py"))
    assert modules
    for path in modules:
        assert (path.parent / "__init__.py").exists(), path
        assert path.stem == "__main__" or path.stem not in sys.stdlib_module_names, path


def test_stdlib_platform_wins_with_the_repository_first_on_the_path() -> None:
    code = "import platform; print(platform.python_version())"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == platform.python_version()


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / out.stdout.split()[-1]) as wheel:
        names = wheel.namelist()
    inside = {name for name in names if name.startswith("bessemer/")}
    others = {name for name in names if ".dist-info/" not in name} - inside
    expected = {str(p.relative_to(SOURCE)) for p in (SOURCE / "bessemer").rglob("*.py")}
    assert inside >= expected | {"bessemer/py.typed"}
    assert not others
    assert any(name.endswith("licenses/LICENSE") for name in names)
