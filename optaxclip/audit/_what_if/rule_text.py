"""Rules written as text, for the command line: `quantile:0.95,1000*2`."""

import ast
import contextlib
import inspect
import math
import re
from typing import Any

import optax

import optaxclip
from optaxclip._show import chosen
from optaxclip.audit._what_if.rule_of import rule_of

RULES = ("constant", "quantile", "tracked_quantile", "zscore", "window_zscore", "ema")
CLIPS = ("clip_by_global_norm", "clip_by_percentile", "autoclip", "zclip")
SYNTAX = (
    "a call as in Python, such as clip_by_percentile(95, window=500), or "
    "NAME:ARGUMENTS, such as constant:1.0 or quantile:0.95,1000; names are "
    f"{', '.join(RULES + CLIPS)}, arguments numbers; *2 after it doubles the "
    "threshold, as in quantile:0.5,100*2"
)
_WORDS = {"inf": math.inf, "nan": math.nan, "true": True, "false": False}


def parse_rule(text: str) -> optax.GradientTransformation:
    """A rule from its text; nothing in the text is executed.

    Args:
      text: A call as Python has it, ``quantile(0.95, window=1000)``, or shorter,
        ``quantile:0.95,1000``; a name alone is a call without arguments. ``*FACTOR``
        after it multiplies the threshold. The names are those of the library's rules,
        and of its clips of the global norm, which stand for the rule inside:
        ``clip_by_global_norm``, ``clip_by_percentile``, ``autoclip`` and ``zclip``.
        Arguments are those of the function of that name, by position or as
        ``name=value``; each is a number, ``inf``, ``true`` or ``false``.

    Returns:
      The rule, as :func:`optaxclip.clip_by` takes it.

    Raises:
      ValueError: the text is none, or the function refuses an argument.

    Example:
      >>> from optaxclip.audit import parse_rule, replay
      >>> print(replay(parse_rule("quantile:0.5,10*3"), [1.0, 2.0, 1.0]).thresholds)
      [inf 3.  4.5]
      >>> rule = parse_rule("clip_by_percentile(50, factor=2, ramp=0)")
      >>> print(replay(rule, [1.0, 2.0, 1.0]).thresholds)
      [2. 3. 2.]
    """
    call = _as_call(text)
    node = _parsed(text, call)
    factor = None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        node, factor = node.left, _value(text, call, node.right)
        if isinstance(factor, bool) or not 0 < factor < math.inf:
            raise ValueError(f"`{text}`: the factor must be above 0 and finite.")
    arguments: list[ast.expr] = []
    keywords: list[ast.keyword] = []
    if isinstance(node, ast.Call):
        node, arguments, keywords = node.func, node.args, node.keywords
    if not isinstance(node, ast.Name) or node.id not in RULES + CLIPS:
        raise ValueError(f"`{text}` is no rule: expected {SYNTAX}.")
    positional = [_value(text, call, argument) for argument in arguments]
    rule = _called(text, node.id, positional, _named(text, call, keywords))
    return rule if factor is None else optax.chain(rule, optax.scale(float(factor)))


def _as_call(text: str) -> str:
    call = text.strip().removeprefix("optaxclip.")
    short = re.fullmatch(r"(\w+)\s*:([^*]*)(.*)", call)
    return f"{short[1]}({short[2]}){short[3]}" if short else call


def _parsed(text: str, call: str) -> ast.expr:
    try:
        return ast.parse(call, mode="eval").body
    except SyntaxError as error:
        raise ValueError(
            f"`{text}` is no rule ({error.msg}): expected {SYNTAX}."
        ) from None
    except (ValueError, MemoryError, RecursionError):  # a null byte; too deep
        raise ValueError(f"`{text:.60}` is no rule: expected {SYNTAX}.") from None


def _named(text: str, call: str, keywords: list[ast.keyword]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for keyword in keywords:
        if keyword.arg is None or keyword.arg in named:
            why = f"{keyword.arg} is given twice" if keyword.arg else "** is refused"
            raise ValueError(f"`{text}`: {why}.")
        named[keyword.arg] = _value(text, call, keyword.value)
    return named


def _value(text: str, call: str, node: ast.expr) -> int | float | bool:
    """The number that a node spells: the only thing an argument can be."""
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    with contextlib.suppress(ValueError):
        value = ast.literal_eval(node)
        if isinstance(value, int | float):
            return value
    source = ast.get_source_segment(call, node)
    raise ValueError(f"`{text}`: {source!r} is not a number.")


def _called(
    text: str, name: str, positional: list[Any], named: dict[str, Any]
) -> optax.GradientTransformation:
    function = getattr(optaxclip, name)
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*positional, **named)
    except TypeError as error:
        raise ValueError(f"`{text}`: {error}; it takes {_takes(signature)}.") from None
    for key in bound.arguments:
        if not _is_number(signature.parameters[key]):
            raise ValueError(f"`{text}`: {key} takes no number, so it has no text.")
    made = function(*positional, **named)  # checks its arguments
    return made if name in RULES else rule_of("parse_rule", made)


def _takes(signature: inspect.Signature) -> str:
    return ", ".join(
        key if p.default is p.empty else f"{key}={p.default}"
        for key, p in signature.parameters.items()
        if _is_number(p)
    )


def _is_number(parameter: inspect.Parameter) -> bool:
    """Whether a number can be meant: not a function, nor the name of an axis."""
    default = chosen(parameter.default)
    return parameter.name != "axis_name" and (
        default is parameter.empty or not callable(default)
    )
