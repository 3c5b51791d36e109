#!/usr/bin/env python3
"""Says which of the names that this package uses of vLLM are gone, or take other parameters, in another version of it.

    pip download --no-deps --dest wheels vllm==0.33.0
    python -m zipfile --extract wheels/vllm-0.33.0-*.whl sources
    python tools/check_vllm.py sources

Nothing of either version is run or imported. The names come from the syntax trees of ``vllm_matquant``: what its
modules import of vLLM; attributes and methods of that, of vLLM's configuration, of values that are annotated with its
classes or tested to be of them; what classes derived from vLLM's override or use of it. Each is looked up where the
version that the package is tested with defines it, and then in the other one. Not seen is what the sources call
``Any``, such as schedulers' statistics and the metadata of attention, and whether a function does what it did.

Exits with 1 where a name is gone or has other parameters.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "vllm_matquant"
# What the package calls values of vLLM's that it leaves without a type.
_CONVENTIONS = {
    "cad": "vllm.v1.attention.backend.CommonAttentionMetadata",
    "common_attn_metadata": "vllm.v1.attention.backend.CommonAttentionMetadata",
    "engine": "vllm.v1.engine.async_llm.AsyncLLM",
    "engine_args": "vllm.engine.arg_utils.EngineArgs",
    "iteration_stats": "vllm.v1.metrics.stats.IterationStats",
    "llm": "vllm.LLM",
    "mapper": "vllm.model_executor.models.utils.WeightsMapper",
    "sampling_metadata": "vllm.v1.sample.metadata.SamplingMetadata",
    "scheduler_stats": "vllm.v1.metrics.stats.SchedulerStats",
    "vllm_config": "vllm.config.VllmConfig",
}

_CALL = "()"  # ends the path of a class that is called

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A module of vLLM's: its name and what it binds."""

    name: str
    names: dict[str, ast.AST] = field(hash=False, compare=False)


@dataclass(frozen=True)
class Thing:
    """What a name stands for: where it is defined, and the statement that does so.

    Attributes:
        module: that it is defined in.
        node: a class, a function, an assignment or an import.
        owner: the class of which it is a member.
        instance: whether it is a value of the class ``node``, rather than the class.
    """

    module: Module
    node: ast.AST
    owner: ast.ClassDef | None = None
    instance: bool = False


class Sources:
    """The sources of one version of vLLM.

    Args:
        folder: that holds the package ``vllm``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """The module of vLLM's of this name, None where there is none."""
        if name.split(".")[0] != "vllm":
            return None
        if name not in self._modules:
            base = self._folder.joinpath(*name.split("."))
            file = next((each for each in (base / "__init__.py", base.with_suffix(".py")) if each.is_file()), None)
            self._modules[name] = None if file is None else Module(name, _bound(ast.parse(file.read_text())))
        return self._modules[name]

    def find(self, path: str) -> Module | Thing | None:
        """What a dotted path such as ``vllm.config.VllmConfig.model_config`` leads to, None where it leads nowhere."""
        root, *parts = path.split(".")
        found: Module | Thing | None = self.module(root)
        for part in parts:
            found = None if found is None else self.member(found, part)
        return found

    def member(self, of: Module | Thing, name: str) -> Module | Thing | None:
        """What ``name`` is in a module, in a class and its bases, or in a value."""
        if isinstance(of, Module):
            node = of.names.get(name)
            if node is not None:
                return self._followed(of, node, name)
            return self.module(f"{of.name}.{name}") or self._from_all(of, name)
        if isinstance(of.node, ast.ClassDef):
            for module, of_class in self._lineage(of.module, of.node):
                node = _members(of_class).get(name)
                if node is not None:
                    return Thing(module, node, of_class)
        return None

    def parameters(self, thing: Module | Thing) -> list[str]:
        """What is given to a function, or to a class to make a value; nothing to what is not called."""
        if isinstance(thing, Module):
            return []
        if isinstance(thing.node, _Function):
            return _parameters(thing.node)
        if not isinstance(thing.node, ast.ClassDef):
            return []
        made_by = self.member(thing, "__init__")
        if isinstance(made_by, Thing) and isinstance(made_by.node, _Function):
            return _parameters(made_by.node)
        fields = [each for _, base in reversed(list(self._lineage(thing.module, thing.node))) for each in base.body]
        return [_field(each) for each in fields if isinstance(each, ast.AnnAssign)]

    def types(self, thing: Module | Thing) -> list[Thing]:
        """The classes of vLLM's of which a value is, as far as its annotation says; instances of them."""
        if isinstance(thing, Module) or isinstance(thing.node, ast.ClassDef):
            return []
        annotation = thing.node.returns if isinstance(thing.node, _Function) else None
        if isinstance(thing.node, ast.AnnAssign):
            annotation = thing.node.annotation
        return [] if annotation is None else self.annotated(thing.module, annotation)

    def annotated(self, module: Module, annotation: ast.expr) -> list[Thing]:
        """The classes of vLLM's that an annotation allows, as the ``module`` names them; instances of them."""
        found = [self._named(module, path) for path in _choices(annotation)]
        return [
            Thing(each.module, each.node, instance=True)
            for each in found
            if isinstance(each, Thing) and isinstance(each.node, ast.ClassDef)
        ]

    def _named(self, module: Module, path: str) -> Module | Thing | None:
        first, *parts = path.split(".")
        found = self.member(module, first) if first in module.names else None
        for part in parts:
            found = None if found is None else self.member(found, part)
        return found

    def _followed(self, module: Module, node: ast.AST, name: str) -> Module | Thing | None:
        """What a statement binds to a name: what is imported is looked up where it comes from."""
        if isinstance(node, ast.Import):
            return next((self.find(each.name) for each in node.names if (each.asname or each.name) == name), None)
        if not isinstance(node, ast.ImportFrom):
            return Thing(module, node)
        origin = self._origin(module, node)
        original = next(each.name for each in node.names if (each.asname or each.name) == name)
        if origin.split(".")[0] != "vllm":
            return Thing(module, node)
        if origin == module.name:  # a package that imports one of its modules
            return self.module(f"{origin}.{original}")
        within = self.module(origin)
        return None if within is None else self.member(within, original)

    def _from_all(self, module: Module, name: str) -> Module | Thing | None:
        """What a name is that a module imports with all others of another one."""
        everything = [node for key, node in module.names.items() if key.startswith("*")]
        origins = [self._origin(module, node) for node in everything if isinstance(node, ast.ImportFrom)]
        within = [module for module in map(self.module, origins) if module is not None]
        return next((found for each in within if (found := self.member(each, name)) is not None), None)

    def _origin(self, module: Module, statement: ast.ImportFrom) -> str:
        """The module that a statement of another one imports from."""
        if not statement.level:
            return statement.module or ""
        parts = module.name.split(".")
        parts = parts[: len(parts) - statement.level + self._is_package(module.name)]
        return ".".join([*parts, *([statement.module] if statement.module else [])])

    def _is_package(self, name: str) -> bool:
        return (self._folder.joinpath(*name.split(".")) / "__init__.py").is_file()

    def _lineage(self, module: Module, of_class: ast.ClassDef) -> Iterator[tuple[Module, ast.ClassDef]]:
        """A class and those of its bases that are vLLM's, with the modules that they are in."""
        yield module, of_class
        for base in of_class.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            found = self._named(module, ast.unparse(plain))
            if isinstance(found, Thing) and isinstance(found.node, ast.ClassDef):
                yield from self._lineage(found.module, found.node)


class Uses(ast.NodeVisitor):
    """Collects what a module of this package uses of vLLM: ``found``, dotted paths with the line of the first use.

    Args:
        sources: of the version that the package is tested with.
        name: of the module, for the lines.
    """

    def __init__(self, sources: Sources, name: str) -> None:
        self.found: dict[str, str] = {}
        self._sources, self._name = sources, name
        self._scopes: list[dict[str, list[Module | Thing]]] = [{}]
        self._bases: list[list[Thing]] = []  # vLLM's, of the classes that are being read

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            if each.name.split(".")[0] == "vllm":
                self._use(each.name, node)
                self._bind(each.asname or "vllm", self._sources.find(each.name if each.asname else "vllm"))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or (node.module or "").split(".")[0] != "vllm":
            return
        for each in node.names:
            path = f"{node.module}.{each.name}"
            self._use(path, node)
            thing = self._sources.find(path)
            typed = self._sources.types(thing) if isinstance(thing, Thing) else []
            self._scopes[-1][each.asname or each.name] = [thing, *typed] if thing else []

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [thing for base in node.bases for thing in self._things(base) if isinstance(thing, Thing)]
        self._bases.append([Thing(each.module, each.node, instance=True) for each in bases])
        for member in node.body:
            for name in _bound_by(member):
                self._use_member(self._bases[-1], name, member)
        self.generic_visit(node)
        self._bases.pop()

    def visit_FunctionDef(self, node: _Function) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope: dict[str, list[Module | Thing]] = {each.arg: self._of_argument(each) for each in arguments}
        if arguments and self._bases and arguments[0].arg == "self":
            scope["self"] = list(self._bases[-1])
        self._scopes.append(scope)
        # Wherever it stands in a function: what a value is tested for is what is used of it.
        for each in ast.walk(node):
            if isinstance(each, ast.Call) and isinstance(each.func, ast.Name) and each.func.id == "isinstance":
                self._note_test(*each.args)
        self.generic_visit(node)
        self._scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                if isinstance(name, ast.Name) and name.id not in _CONVENTIONS:
                    self._scopes[-1][name.id] = self._things(value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self._use_member(self._things(node.value), node.attr, node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        for each in self._things(node.func):
            if isinstance(each, Thing) and _is_class(each):
                self._use(f"{_path(each)}{_CALL}", node)

    def _note_test(self, value: ast.expr, classes: ast.expr) -> None:
        if isinstance(value, ast.Name):
            for each in classes.elts if isinstance(classes, ast.Tuple) else [classes]:
                things = [thing for thing in self._things(each) if isinstance(thing, Thing)]
                made = [Thing(thing.module, thing.node, instance=True) for thing in things]
                self._scopes[-1].setdefault(value.id, []).extend(made)

    def _of_argument(self, argument: ast.arg) -> list[Module | Thing]:
        choices = [] if argument.annotation is None else list(_choices(argument.annotation))
        named = [thing for choice in choices for thing in self._things(ast.parse(choice, mode="eval").body)]
        made = [
            Thing(each.module, each.node, instance=True)
            for each in named
            if isinstance(each, Thing) and isinstance(each.node, ast.ClassDef)
        ]
        return [*made] or self._by_convention(argument.arg)

    def _by_convention(self, name: str) -> list[Module | Thing]:
        thing = self._sources.find(_CONVENTIONS[name]) if name in _CONVENTIONS else None
        return [Thing(thing.module, thing.node, instance=True)] if isinstance(thing, Thing) else []

    def _things(self, node: ast.expr) -> list[Module | Thing]:
        """What an expression may be, as far as it comes from vLLM."""
        if isinstance(node, ast.Name):
            bound = next((scope[node.id] for scope in reversed(self._scopes) if node.id in scope), [])
            return bound or self._by_convention(node.id)
        if isinstance(node, ast.Attribute):
            members = [self._sources.member(of, node.attr) for of in self._things(node.value)]
            known = [each for each in members if each is not None]
            made = [made for each in known for made in self._sources.types(each)]
            return [*known, *made] or self._by_convention(node.attr)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "super":
                return list(self._bases[-1]) if self._bases else []
            called = [each for each in self._things(node.func) if isinstance(each, Thing)]
            made = [Thing(each.module, each.node, instance=True) for each in called if _is_class(each)]
            return [*made, *(made for each in called for made in self._sources.types(each))]
        if isinstance(node, ast.IfExp):
            return [*self._things(node.body), *self._things(node.orelse)]
        return []

    def _use_member(self, of: Iterable[Module | Thing], name: str, node: ast.AST) -> None:
        """Count a member of whichever of some things has it."""
        for each in of:
            member = self._sources.member(each, name)
            if member is not None:
                self._use(f"{_path(each)}.{name}", node)

    def _use(self, path: str, node: ast.AST) -> None:
        self.found.setdefault(path, f"{self._name}:{getattr(node, 'lineno', 0)}")

    def _bind(self, name: str, thing: Module | Thing | None) -> None:
        self._scopes[-1][name] = [] if thing is None else [thing]


def used_names(package: Path, tested: Sources) -> dict[str, str]:
    """The dotted paths that the modules of a package use of vLLM, with the line of the first use of each.

    Args:
        package: a folder of Python modules.
        tested: the version of vLLM by which the names are understood.
    """
    found: dict[str, str] = {}
    for file in sorted(package.rglob("*.py")):
        uses = Uses(tested, str(file.relative_to(package.parent)))
        uses.visit(ast.parse(file.read_text()))
        found = uses.found | found
    return dict(sorted(found.items()))


def differences(names: dict[str, str], tested: Sources, other: Sources) -> Iterator[str]:
    """A line for each name that is gone in another version of vLLM, or has other parameters there."""
    for path, line in names.items():
        before, after = (each.find(path.removesuffix(_CALL)) for each in (tested, other))
        if before is None:
            yield f"{path} ({line}): not found where the tested version should have it"
        elif after is None:
            yield f"{path} ({line}): missing"
        elif isinstance(before, Thing) and _is_class(before) and not path.endswith(_CALL):
            continue  # which is not called, but derived from or asked for
        elif (old := tested.parameters(before)) != (new := other.parameters(after)):
            yield f"{path} ({line}): takes ({', '.join(old)}), in the other version ({', '.join(new)})"


def _path(thing: Module | Thing) -> str:
    if isinstance(thing, Module):
        return thing.name
    assert isinstance(thing.node, ast.ClassDef)
    return f"{thing.module.name}.{thing.node.name}"


def _is_class(thing: Thing) -> bool:
    return isinstance(thing.node, ast.ClassDef) and not thing.instance


def _parameters(function: _Function) -> list[str]:
    """Parameters of a function as they stand, without types; ``=`` for a default, whatever it is."""
    given = function.args
    plain = [*given.posonlyargs, *given.args]
    required = len(plain) - len(given.defaults)
    found = [each.arg + "=" * (index >= required) for index, each in enumerate(plain)]
    if given.posonlyargs:
        found.insert(len(given.posonlyargs), "/")
    if given.vararg or given.kwonlyargs:
        found.append(f"*{given.vararg.arg}" if given.vararg else "*")
    pairs = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    found += [each.arg + "=" * (default is not None) for each, default in pairs]
    return [*found, *([f"**{given.kwarg.arg}"] if given.kwarg else [])]


def _field(statement: ast.AnnAssign) -> str:
    return ast.unparse(statement.target) + "=" * (statement.value is not None)


def _choices(annotation: ast.expr) -> Iterator[str]:
    """The names that an annotation joins by ``|`` or ``Optional``, also where it is a text."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):
        yield from _choices(annotation.left)
        yield from _choices(annotation.right)
    elif isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in ("Optional", "type"):
        yield from _choices(annotation.slice)
    elif isinstance(annotation, (ast.Name, ast.Attribute)):
        yield ast.unparse(annotation)


def _bound_by(statement: ast.AST) -> list[str]:
    if isinstance(statement, ast.ClassDef | _Function):
        return [statement.name]
    if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
        return [f"*{statement.level}{statement.module}"]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [each.asname or each.name for each in statement.names]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
    return [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]


def _bound(tree: ast.AST) -> dict[str, ast.AST]:
    """What the statements of a module bind, those under a condition too; what is defined goes before imports."""
    found: dict[str, ast.AST] = {}
    for statement in getattr(tree, "body", []):
        for name in _bound_by(statement):
            found[name] = statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for branch in (statement, *_other_branches(statement)):
                found = _bound(branch) | found
    return found


def _other_branches(statement: ast.If | ast.Try | ast.With) -> Iterator[ast.AST]:
    yield ast.Module(getattr(statement, "orelse", []), [])
    yield from getattr(statement, "handlers", [])


@cache
def _members(of_class: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class has of its own: what its body binds, and what its methods assign to ``self``."""
    found: dict[str, ast.AST] = {}
    for function in (each for each in of_class.body if isinstance(each, _Function)):
        for statement in ast.walk(function):
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
            for each in (each for target in targets for each in ast.walk(target)):
                if isinstance(each, ast.Attribute) and ast.unparse(each.value) == "self":
                    found.setdefault(each.attr, statement)
    return found | _bound(of_class)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="that holds the package vllm of another version, such as a wheel's")
    parser.add_argument("--tested", type=Path, help="the same of the tested version; by default the installed one")
    given = parser.parse_args(arguments)
    spec = find_spec("vllm") if given.tested is None else None
    tested = Path(spec.origin).parent.parent if spec and spec.origin else given.tested or Path()
    for name, folder in (("folder", given.folder), ("--tested", tested)):
        if not (folder / "vllm" / "__init__.py").is_file():
            parser.error(f"{name}: found no vllm/__init__.py in {folder}, expected unpacked sources of vLLM")
    before, after = Sources(tested), Sources(given.folder)
    names = used_names(PACKAGE, before)
    found = list(differences(names, before, after))
    print(*found, f"{len(names)} names, {len(found)} missing or with other parameters", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
