"""Arrows between modules point one way: app, studio, then pipeline and reconstruction, then models, then leaves."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEAVES = {"coser.cameras", "coser.views", "coser.rasterizer"}


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, also inside functions."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def offenders(files, forbidden: tuple[str, ...]) -> list[str]:
    return [f"{path.relative_to(ROOT)} imports {name}" for path in files for name in sorted(imports(path))
            if any(name == f or name.startswith(f + ".") for f in forbidden)]


def test_gradio_stays_in_the_app():
    assert offenders((ROOT / "coser").rglob("*.py"), ("gradio", "spaces")) == []


def test_trimesh_stays_in_reconstruction_and_data():
    files = [p for p in (ROOT / "coser").rglob("*.py") if p.parent.name not in ("reconstruction", "data")]
    assert offenders(files, ("trimesh",)) == []


def test_models_know_leaves_only():
    known = set().union(*map(imports, (ROOT / "coser" / "models").glob("*.py")))
    assert {name for name in known if name.startswith("coser.") and not name.startswith("coser.models")} <= LEAVES


def test_nothing_below_the_studio_knows_it():
    above = ("coser.studio", "coser.request", "coser.__main__", "app")
    files = [p for p in (ROOT / "coser").rglob("*.py")
             if p.name not in ("studio.py", "finishing.py", "__main__.py", "benchmark.py", "examples.py")]
    assert offenders(files, above) == []


def test_pipeline_and_reconstruction_do_not_know_each_other():
    reconstruction = (ROOT / "coser" / "reconstruction").glob("*.py")
    assert offenders(reconstruction, ("coser.pipeline", "coser.models")) == []
    assert offenders([ROOT / "coser" / "pipeline.py"], ("coser.reconstruction",)) == []


def test_importing_every_module_says_nothing_and_asks_no_network():
    script = ("import socket; socket.socket.connect = socket.socket.connect_ex = lambda *a: 1 / 0\n"
              "import coser, importlib, pkgutil, sys\n"
              "assert 'torch' not in sys.modules\n"
              "for module in pkgutil.walk_packages(coser.__path__, 'coser.'): importlib.import_module(module.name)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
