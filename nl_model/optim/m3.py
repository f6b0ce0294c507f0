"""M3, multi-scale momentum Muon: a fast and a slow momentum, both orthogonalised (Algorithm 1)."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Optional, Tuple

from torch import Tensor, nn
from torch.nn import Parameter

from nl_model.config import OptimizerConfig
from nl_model.optim.matrix import MatrixOptimizer, kept
from nl_model.optim.muon import newton_schulz, shape_scale
from nl_model.optim.registry import matrix_settings, register


class M3(MatrixOptimizer):
    """W -= lr * (O1 + slow_weight * O2), O1 and O2 the orthogonalised fast and slow momentum.

    The slow momentum takes the gradients of `slow_period` writes at the end of that period; O2 is constant in between
    and zero in the first period. It thus holds what the fast one has long forgotten.

    By default both are moving averages, nothing divides the direction, and steps scale with shape as Muon's do: the
    step does not depend on the gradients' scale. `literal` is Algorithm 1 as printed: M1 += b1 g, V += b2 g^2,
    M2 += b3 * (sum over the period), (O1 + slow_weight * O2) / (sqrt(V) + eps). Nothing decays there, so the steps
    shrink as AdaGrad's do, and gradients c times as large make steps 1 / c as large.

    Args:
        parameters: what it writes; vectors go to AdamW.
        lr: step size.
        betas: (fast momentum's b1, b2); they are AdamW's as well.
        beta3: the slow momentum's, counted in periods.
        slow_period: writes per update of the slow momentum.
        slow_weight: the paper's alpha.
        literal: as above.
        ns_steps, weight_decay, others, eps, adamw_scale: as in `Muon`.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        lr: float = 0.02,
        betas: Tuple[float, float] = (0.9, 0.95),
        beta3: float = 0.9,
        slow_period: int = 8,
        slow_weight: float = 0.5,
        literal: bool = False,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        others: Iterable[Parameter] = (),
        eps: float = 1e-8,
        adamw_scale: float = 0.1,
    ) -> None:
        settings = {"beta3": beta3, "slow_period": slow_period, "slow_weight": slow_weight, "literal": literal}
        adamw = {"betas": betas, "eps": eps, "adamw_scale": adamw_scale}
        defaults = {"lr": lr, "weight_decay": weight_decay, "ns_steps": ns_steps, **settings, **adamw}
        super().__init__(parameters, defaults, others)

    def direction(self, parameter: Tensor, gradient: Tensor, state: Dict[str, Any], group: Dict[str, Any]) -> Tensor:
        """The two directions together; at the end of a period it then turns the slow one."""
        (b1, b2), literal = group["betas"], group["literal"]
        fast, period_sum = kept(state, "fast", gradient), kept(state, "period_sum", gradient)
        slow_direction = kept(state, "slow_direction", gradient)
        fast.mul_(1.0 if literal else b1).add_(gradient, alpha=b1 if literal else 1 - b1)
        period_sum.add_(gradient)
        both = newton_schulz(fast, group["ns_steps"]).add(slow_direction, alpha=group["slow_weight"])
        if group["step"] % group["slow_period"] == 0:
            self._turn_slow(state, group)
        if not literal:
            return shape_scale(gradient) * both
        squares = kept(state, "squares", gradient).addcmul_(gradient, gradient, value=b2)
        return both / (squares.sqrt() + group["eps"])

    def _turn_slow(self, state: Dict[str, Any], group: Dict[str, Any]) -> None:
        """Take a period's gradients into the slow momentum; its direction is used from the next write on."""
        b3, literal = group["beta3"], group["literal"]
        slow, weight = kept(state, "slow", state["fast"]), b3 if literal else (1 - b3) / group["slow_period"]
        slow.mul_(1.0 if literal else b3).add_(state["period_sum"], alpha=weight)
        state["slow_direction"].copy_(newton_schulz(slow, group["ns_steps"]))
        state["period_sum"].zero_()


@register("m3")
def build(parameters: List[Parameter], cfg: OptimizerConfig, model: Optional[nn.Module]) -> M3:
    """M3 as a level configures it."""
    return M3(
        parameters,
        beta3=cfg.beta3,
        slow_period=cfg.slow_period,
        slow_weight=cfg.slow_weight,
        literal=cfg.literal,
        **matrix_settings(cfg, model),
    )
