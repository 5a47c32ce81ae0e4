"""Imports inside the package only go down: a room may use those below it, never those above, and there are no circles."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "moedist"
ROOMS = ["__main__", "cli", "commands", "submit", "compressing", "huggingface", "bench", "trainer", "evaluate", "generate",
         "inspect_run", "inspect_routing", "show_probe", "show_links", "show_plan", "report", "decoding", "phases",
         "coordinator", "links", "neurons", "traces", "monitor", "checkpoint", "engine", "data", "offload", "model",
         "dispatch", "compress", "routing", "placement", "world", "islands", "timing", "guard", "rendezvous", "faults", "mpi",
         "liveness", "milestones", "run_folder", "text_table", "config", "errors"]  # top to bottom
PURE = ["compress", "routing", "placement"]  # no process groups, no files


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute here"
            found.add(node.module)
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_go_down():
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room == "__init__":
            continue
        assert room in ROOMS, f"{path}: a new room needs a place in the order"
        for module in imported_modules(path):
            if module.startswith("moedist."):
                other = module.split(".")[1]
                assert other == room or ROOMS.index(other) > ROOMS.index(room), f"{path} imports {module} from above"


def test_pure_rooms_know_no_processes():
    for room in PURE:
        for path in (PACKAGE / room).rglob("*.py"):
            modules = imported_modules(path)
            assert not {m for m in modules if m.startswith(("torch.distributed", "moedist.world"))}, path
            assert room in ("compress", "routing") or not {m for m in modules if m.split(".")[0] == "torch"}, path


def test_files_are_one_idea_long():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
