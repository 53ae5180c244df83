"""Rules written as text, for the command line: `quantile:0.95,1000*2`."""

import inspect
import math
from typing import Any

import optax

import optaxclip

RULES = ("constant", "quantile", "tracked_quantile", "zscore", "window_zscore", "ema")
SYNTAX = (
    "NAME:ARGUMENTS, as in constant:1.0, quantile:0.95,1000 or zscore:decay=0.99; "
    f"names are {', '.join(RULES)}, arguments those of the function of that name; "
    "*2 behind it doubles the threshold, as in quantile:0.5,100*2"
)


def parse_rule(text: str) -> optax.GradientTransformation:
    """A rule from its text; nothing in the text is executed.

    Args:
      text: ``NAME``, ``NAME:ARGUMENTS`` or either with ``*FACTOR`` behind it. The names
        are those of the library's rules. Arguments are numbers, or ``true`` and
        ``false``, separated by commas, by position or as ``name=value``.

    Returns:
      The rule, as :func:`optaxclip.clip_by` takes it.

    Raises:
      ValueError: the text is none, or the rule refuses an argument.

    Example:
      >>> from optaxclip.audit import parse_rule, replay
      >>> print(replay(parse_rule("quantile:0.5,10*3"), [1.0, 2.0, 1.0]).thresholds)
      [inf 3.  4.5]
    """
    call, star, factor_text = text.partition("*")
    name, _, arguments = call.strip().partition(":")
    if name not in RULES:
        raise ValueError(f"`{text}` is no rule: expected {SYNTAX}.")
    rule = _called(text, getattr(optaxclip, name), arguments)
    if not star:
        return rule
    factor = _value(text, factor_text)
    if isinstance(factor, bool) or not 0 < factor < math.inf:
        raise ValueError(f"`{text}`: the factor must be above 0 and finite.")
    return optax.chain(rule, optax.scale(float(factor)))


def _called(text: str, function: Any, arguments: str) -> optax.GradientTransformation:
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in arguments.split(","))):
        key, equals, value = map(str.strip, part.partition("="))
        if key in named:
            raise ValueError(f"`{text}`: {key} is given twice.")
        if equals:
            named[key] = _value(text, value)
        elif named:
            raise ValueError(f"`{text}`: {part} stands behind an argument with a name.")
        else:
            positional.append(_value(text, part))
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*positional, **named).arguments
    except TypeError as error:
        raise ValueError(f"`{text}`: {error}; it takes {_takes(signature)}.") from None
    for key in bound:
        if _is_function(signature.parameters[key]):
            raise ValueError(f"`{text}`: {key} is a function and has no text.")
    return function(*positional, **named)


def _takes(signature: inspect.Signature) -> str:
    return ", ".join(
        key if p.default is p.empty else f"{key}={p.default}"
        for key, p in signature.parameters.items()
        if not _is_function(p)
    )


def _is_function(parameter: inspect.Parameter) -> bool:
    default = parameter.default
    return default is not parameter.empty and callable(default)


def _value(text: str, value: str) -> int | float | bool:
    value = value.strip()
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            pass
    raise ValueError(f"`{text}`: {value!r} is not a number.")
