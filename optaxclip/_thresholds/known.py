"""Rules that are known to be rules."""

import optax

Rule = optax.GradientTransformation | optax.GradientTransformationExtraArgs


class KnownRule(optax.GradientTransformationExtraArgs):
    """A rule of this package, which ``init`` does not have to try out."""


def known(rule: Rule, *parts: Rule) -> optax.GradientTransformationExtraArgs:
    """The rule as a known one, unless a part that it is made of is not."""
    rule = optax.with_extra_args_support(rule)
    if not all(isinstance(part, KnownRule) for part in parts):
        return rule
    return KnownRule(rule.init, rule.update)
