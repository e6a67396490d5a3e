"""What a model does between its last hidden state and its logits, read from the source of its own forward.

transformers has no common name for it: Gemma caps with `final_logit_softcapping`, Cohere multiplies by `logit_scale`,
Granite divides by `logits_scaling`, Falcon-H1 multiplies by `lm_head_multiplier`, MiniCPM3 divides the hidden state.
A list of config names would silently miss the next family, so the few statements that build `logits` are evaluated
symbolically with the model's real attributes. A construct that is not a scale or a tanh cap is refused, never guessed.
"""

import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import nn


class UnsupportedHeadError(ValueError):
    """The model computes its logits in a way that `LMHead` cannot express."""


@dataclass(frozen=True)
class LogitsRecipe:
    """logits = softcap * tanh(logit_scale * z / softcap) with z = hidden W^T + bias; softcap None: logit_scale * z."""

    backbone: str  # attribute path of the module whose last hidden state feeds the head, "model" or "model.decoder"
    logit_scale: float = 1.0
    softcap: float | None = None
    dropout: str | None = None  # attribute path of a dropout between the two


@dataclass(frozen=True)
class _Known:
    value: Any  # a real Python object: the model, a submodule, a config entry, a number, None


@dataclass(frozen=True)
class _Outputs:
    backbone: str


@dataclass(frozen=True)
class _Hidden:
    backbone: str
    scale: float = 1.0
    dropout: str | None = None


@dataclass(frozen=True)
class _Logits:
    backbone: str
    scale: float = 1.0  # outside tanh if capped
    inner: float | None = None  # capped: value = scale * tanh(inner * z)
    dropout: str | None = None


class _Unknown:
    pass


_UNKNOWN = _Unknown()
_Value = _Known | _Outputs | _Hidden | _Logits | _Unknown
_KEEPS = {"to", "float", "contiguous", "type_as"}  # tensor methods that change neither value nor meaning


def read_logits_recipe(model: nn.Module, head: nn.Module, *, pooled: bool = False) -> LogitsRecipe:
    """Evaluates `type(model).forward` symbolically up to its logits.

    Args:
        model: a causal LM of transformers, or a sequence or token classifier (not wrapped).
        head: its output embedding, as `model.get_output_embeddings()` returns it, or its score layer.
        pooled: the model may select one token's logits, as sequence classifiers do.

    Returns:
        The backbone's attribute path, the logit scale, the soft cap and the dropout.

    Raises:
        UnsupportedHeadError: the source cannot be read, or holds something else than scaling and a tanh cap.
    """
    cls = type(model)
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise UnsupportedHeadError(
            f"the source of {cls.__name__}.forward cannot be read ({error}), so what it does to its logits is "
            "unknown; pass logit_scale= and softcap= to patch_model to state it"
        ) from error
    if not isinstance(function, ast.FunctionDef):
        raise UnsupportedHeadError(f"{cls.__name__}.forward is not a plain function")
    logits = _Interpreter(model, head, pooled).run(function)
    if logits.inner is None:
        return LogitsRecipe(logits.backbone, logits.scale, dropout=logits.dropout)
    return LogitsRecipe(logits.backbone, logits.inner * logits.scale, logits.scale, logits.dropout)


class _Interpreter:
    def __init__(self, model: nn.Module, head: nn.Module, pooled: bool) -> None:
        self.name = type(model).__name__
        self.model, self.head, self.pooled = model, head, pooled
        self.env: dict[str, _Value] = {"self": _Known(model), "labels": _Known(None)}
        self.logits: _Logits | None = None

    def refuse(self, node: ast.AST, why: str) -> UnsupportedHeadError:
        return UnsupportedHeadError(
            f"{self.name}.forward: `{ast.unparse(node)[:160]}` {why}; only a scale and a tanh soft cap between the "
            "lm_head and the logits are supported. If you know this model's logits, pass logit_scale= and softcap="
        )

    def run(self, function: ast.FunctionDef) -> _Logits:
        self.block(function.body)
        if self.logits is None:
            raise UnsupportedHeadError(
                f"{self.name}.forward never applies its output embedding ({type(self.head).__name__}) to the last "
                "hidden state of one backbone"
            )
        return self.logits

    def block(self, body: Sequence[ast.stmt]) -> bool:
        """Runs statements; True once a return was reached."""
        for node in body:
            if isinstance(node, ast.Return):
                return True
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if node.value is not None:
                    self.assign(targets, self.value(node.value))
            elif isinstance(node, ast.AugAssign):
                self.assign([node.target], self.binary(node, node.op, node.target, node.value))
            elif isinstance(node, ast.If):
                truth = self.truth(node.test)
                if truth is None:
                    self.skip(node, [*node.body, *node.orelse])
                elif self.block(node.body if truth else node.orelse):
                    return True
            elif not isinstance(node, ast.Expr | ast.Pass | ast.Raise | ast.Assert):
                self.skip(node, [node])
        return False

    def assign(self, targets: Sequence[ast.expr], value: _Value) -> None:
        for target in targets:
            if isinstance(target, ast.Name):
                self.env[target.id] = value
            elif isinstance(target, ast.Subscript | ast.Attribute):
                base = self.value(target.value)
                if isinstance(base, _Logits | _Hidden):
                    raise self.refuse(target, "is written in place")
            else:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        self.env[name.id] = _UNKNOWN
        if isinstance(value, _Logits):
            self.logits = value

    def skip(self, node: ast.AST, body: Sequence[ast.AST]) -> None:
        """A branch or loop that cannot be decided: allowed only if the logits come out the same either way."""
        stored: set[str] = set()
        for inner in (n for part in body for n in ast.walk(part)):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                stored.add(inner.id)
            if isinstance(inner, ast.Call) and self.callee(inner) is self.head:
                raise self.refuse(node, "applies the lm_head under a condition that is not known")
        before = {name: self.env.get(name, _UNKNOWN) for name in stored}
        tracked = {name for name, value in before.items() if isinstance(value, _Logits | _Hidden | _Outputs)}
        if tracked:
            for branch in (node.body, node.orelse) if isinstance(node, ast.If) else ():
                self.block(branch)
                if any(self.env.get(name) != before[name] for name in tracked):
                    raise self.refuse(node, "changes what feeds the logits under a condition that is not known")
            if not isinstance(node, ast.If):
                raise self.refuse(node, "changes what feeds the logits in a way that is not understood")
        self.env.update(dict.fromkeys(stored - tracked, _UNKNOWN))

    def callee(self, node: ast.Call) -> Any:
        path = self.path(node.func)
        return None if path is None else attrgetter(path)(self.model)

    def path(self, func: ast.expr) -> str | None:
        """Attribute path, from the model, of what is called: `self.a.b`, or `getattr(self, name)`."""
        if isinstance(func, ast.Call) and ast.unparse(func.func) == "getattr" and len(func.args) == 2:
            base, name = (self.value(arg) for arg in func.args)
            known = isinstance(base, _Known) and base.value is self.model and isinstance(name, _Known)
            return str(name.value) if known else None  # type: ignore[union-attr]
        if isinstance(func, ast.Attribute):
            base = self.value(func.value)
            if isinstance(base, _Known) and hasattr(base.value, func.attr) and ast.unparse(func).startswith("self."):
                return ast.unparse(func).removeprefix("self.")
        return None

    def truth(self, test: ast.expr) -> bool | None:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            parts = [self.truth(part) for part in test.values]
            decisive = isinstance(test.op, ast.Or)
            if decisive in parts:
                return decisive
            return None if None in parts else not decisive
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            left, right = self.value(test.left), self.value(test.comparators[0])
            if isinstance(left, _Known) and isinstance(right, _Known):
                operators: dict[type[ast.cmpop], Any] = {
                    ast.Is: lambda a, b: a is b,
                    ast.IsNot: lambda a, b: a is not b,
                    ast.Eq: lambda a, b: a == b,
                    ast.NotEq: lambda a, b: a != b,
                    ast.Gt: lambda a, b: a > b,
                    ast.Lt: lambda a, b: a < b,
                }
                operator = operators.get(type(test.ops[0]))
                return None if operator is None else bool(operator(left.value, right.value))
            return None
        value = self.value(test)
        return bool(value.value) if isinstance(value, _Known) else None

    def value(self, node: ast.expr) -> _Value:
        if isinstance(node, ast.Constant):
            return _Known(node.value)
        if isinstance(node, ast.Name):
            return self.env.get(node.id, _UNKNOWN)
        if isinstance(node, ast.Attribute):
            base = self.value(node.value)
            if isinstance(base, _Known) and hasattr(base.value, node.attr):
                return _Known(getattr(base.value, node.attr))
            if isinstance(base, _Outputs) and node.attr == "last_hidden_state":
                return _Hidden(base.backbone)
            return _UNKNOWN
        if isinstance(node, ast.Subscript):
            base = self.value(node.value)
            if isinstance(base, _Outputs) and isinstance(node.slice, ast.Constant) and node.slice.value == 0:
                return _Hidden(base.backbone)
            if isinstance(base, _Logits) and not self.pooled:
                raise self.refuse(node, "selects a part of the logits")
            return base if isinstance(base, _Hidden | _Logits) else _UNKNOWN  # hidden[:, slice_indices, :]
        if isinstance(node, ast.IfExp):
            truth = self.truth(node.test)
            if truth is not None:
                return self.value(node.body if truth else node.orelse)
            one, other = self.value(node.body), self.value(node.orelse)
            if one != other and isinstance(one, _Logits | _Hidden) != isinstance(other, _Logits | _Hidden):
                raise self.refuse(node, "depends on a condition that is not known")
            return one if one == other else _UNKNOWN
        if isinstance(node, ast.BinOp):
            return self.binary(node, node.op, node.left, node.right)
        if isinstance(node, ast.Call):
            return self.call(node)
        return _UNKNOWN

    def binary(self, node: ast.AST, op: ast.operator, left: ast.expr, right: ast.expr) -> _Value:
        a, b = self.value(left), self.value(right)
        if isinstance(b, _Logits | _Hidden) and isinstance(op, ast.Mult):
            a, b = b, a
        if not isinstance(a, _Logits | _Hidden):
            if isinstance(b, _Logits | _Hidden):
                raise self.refuse(node, "is not understood")
            if isinstance(a, _Known) and isinstance(b, _Known) and isinstance(op, ast.Div | ast.Mult):
                return _Known(a.value / b.value if isinstance(op, ast.Div) else a.value * b.value)
            return _UNKNOWN
        number = isinstance(b, _Known) and isinstance(b.value, int | float) and not isinstance(b.value, bool)
        if not number or not isinstance(op, ast.Mult | ast.Div):
            raise self.refuse(node, "is neither a product nor a quotient with a number of the model's")
        factor = float(b.value) if isinstance(op, ast.Mult) else 1.0 / b.value  # type: ignore[union-attr]
        return replace(a, scale=a.scale * factor)

    def call(self, node: ast.Call) -> _Value:
        arguments = [self.value(arg) for arg in node.args] + [self.value(word.value) for word in node.keywords]
        tensors = [arg for arg in arguments if isinstance(arg, _Logits | _Hidden)]
        if isinstance(node.func, ast.Attribute):
            base = self.value(node.func.value)
            if isinstance(base, _Logits | _Hidden):
                if node.func.attr in _KEEPS:
                    return base
                raise self.refuse(node, "is not understood")
        path = self.path(node.func)
        module = None if path is None else attrgetter(path)(self.model)
        if isinstance(module, nn.Module):
            return self.module(node, module, str(path), arguments)
        name = ast.unparse(node.func)
        if name == "slice_logits_to_keep" and tensors and isinstance(tensors[0], _Hidden):
            return tensors[0]
        if name.rsplit(".", 1)[-1] == "tanh" and tensors and isinstance(tensors[0], _Logits):
            if tensors[0].inner is not None:
                raise self.refuse(node, "caps the logits twice")
            return replace(tensors[0], scale=1.0, inner=tensors[0].scale)
        if tensors:
            raise self.refuse(node, "is not understood")
        return _UNKNOWN

    def module(self, node: ast.Call, module: nn.Module, path: str, arguments: list[_Value]) -> _Value:
        if module is self.head:
            hidden = arguments[0] if len(arguments) == 1 else None
            if not isinstance(hidden, _Hidden):
                raise self.refuse(node, "does not project the backbone's last hidden state")
            if hidden.scale != 1.0 and getattr(module, "bias", None) is not None:
                raise self.refuse(node, "scales the hidden state before a head with a bias")
            return _Logits(hidden.backbone, hidden.scale, dropout=hidden.dropout)
        first = arguments[0] if len(arguments) == 1 else None
        if type(module) is nn.Dropout and isinstance(first, _Hidden) and first.dropout is None:
            return replace(first, dropout=path)
        if any(isinstance(arg, _Logits | _Hidden) for arg in arguments):
            raise self.refuse(node, "transforms the hidden state or the logits by a module of its own")
        ids = node.args[0] if node.args else None
        takes_ids = isinstance(ids, ast.Name) and ids.id == "input_ids"
        if takes_ids or any(word.arg == "input_ids" for word in node.keywords):
            return _Outputs(path)
        return _UNKNOWN
