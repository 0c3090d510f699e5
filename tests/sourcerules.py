"""What the package's code must never do, found in its syntax: run what others wrote, or touch global generators."""

from __future__ import annotations

import ast
from collections.abc import Iterator

MODULES = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "random")
"""Not to be imported."""

CALLS = (
    *("eval", "exec", "compile", "__import__", "breakpoint"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.execl", "os.spawnv", "os.spawnl", "pty.spawn"),
    *("asyncio.create_subprocess_shell", "asyncio.subprocess.create_subprocess_shell"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp", "shutil.unpack_archive"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.save"),
    *("torch.manual_seed", "torch.seed", "torch.set_rng_state", "torch.random.manual_seed"),
    *("torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "torch.mps.manual_seed"),
    *("transformers.set_seed", "accelerate.utils.set_seed", "diffusers.training_utils.set_seed"),
    *("torch.rand_like", "torch.randn_like", "torch.randint_like"),  # they take no generator
)
"""Not to be called."""

DRAWS = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson")
DRAWING_METHODS = ("uniform_", "normal_", "random_", "exponential_", "bernoulli_", "cauchy_", "log_normal_")
"""What draws random numbers: from a generator of ours only."""

NUMPY_GENERATORS = ("default_rng", "Generator", "SeedSequence", "PCG64", "Philox")
DYNAMIC = ("importlib.import_module", "importlib.util.spec_from_file_location", "importlib.util.module_from_spec")
LIBRARIES = ("transformers", "diffusers", "peft", "accelerate")
PROCESSES = (
    "subprocess.run",
    "subprocess.Popen",
    "subprocess.call",
    "subprocess.check_call",
    "subprocess.check_output",
)
UNPACKING = ("extractall", "extract")


def violations(source: str, may_import: bool = False) -> list[str]:
    """A line for everything forbidden in some code; ``may_import``: whether it may import modules by name."""
    tree = ast.parse(source)
    names = aliases(tree)
    found = [f"{line}: {what}" for line, what in imports(tree)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {what}" for what in called(node, dotted(node.func, names), may_import)]
        elif isinstance(node, (ast.Name, ast.Attribute)):
            found += [f"{node.lineno}: {what}" for what in named(dotted(node, names))]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found += [f"{node.lineno}: {what}" for what in opened(node)]
    return found


def aliases(tree: ast.AST) -> dict[str, str]:
    """What the names that a module imports stand for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of an expression, such as "torch.nn.functional.relu"; of any other expression, what is after it."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return "?"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module]
        for module in modules:
            if module.split(".")[0] in MODULES:
                yield node.lineno, f"imports {module}"


def named(name: str) -> Iterator[str]:
    library, _, rest = name.partition(".")
    last = rest.rpartition(".")[2]
    if library in LIBRARIES and (last.startswith("Auto") and last[4:5].isupper() and last != "AutoencoderKL"):
        yield f"{name}: takes whatever class a config names"
    if library == "diffusers" and last.endswith("Pipeline"):
        yield f"{name}: pipelines run code that a repository names"


def called(node: ast.Call, name: str, may_import: bool) -> Iterator[str]:
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    name = name.removeprefix("builtins.")
    if name in CALLS or (name.startswith("os.") and last.startswith(("exec", "spawn", "posix_spawn"))):
        yield f"calls {name}"
    if name in DYNAMIC and not may_import and not (node.args and isinstance(node.args[0], ast.Constant)):
        yield f"calls {name}"
    if name == "torch.load" and not is_constant(keywords.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if name == "numpy.load" and "allow_pickle" in keywords:
        yield "numpy.load with allow_pickle"
    if "shell" in keywords and not is_constant(keywords["shell"], False):
        yield "a shell"
    if name in PROCESSES and node.args and isinstance(node.args[0], (ast.Constant, ast.JoinedStr)):
        yield f"{name} with a string instead of a list"
    yield from (f"the argument {key}" for key in ("trust_remote_code", "custom_pipeline") if key in keywords)
    if last == "cuda" and name != "torch.version.cuda":
        yield "calls .cuda()"
    if name.startswith("numpy.random.") and name.split(".")[2] not in NUMPY_GENERATORS:
        yield f"{name}: a global generator"
    draws = (first == "torch" and name.count(".") == 1 and last in DRAWS) or last in DRAWING_METHODS
    if draws and "generator" not in keywords:
        yield f"{name} without a generator"
    if last in UNPACKING and first in ("tarfile", "zipfile"):
        yield f"calls {name}"


def opened(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Libraries may open local files only, and of networks safetensors only."""
    text = ast.unparse(function)
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    opens = [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "from_pretrained"]
    if opens and "local_files_only" not in text:
        yield f"{function.name}: from_pretrained without local_files_only"
    networks = [call for call in opens if not ast.unparse(call.value).endswith("Tokenizer")]
    if networks and "use_safetensors" not in text:
        yield f"{function.name}: from_pretrained without use_safetensors"


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
