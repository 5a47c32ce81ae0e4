"""Thor: random experts that are trained to agree, whichever are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from moedist.config import key
from moedist.errors import ConfigError
from moedist.routing.random import RandomRouter


@dataclass(frozen=True)
class ThorOptions:
    consistency: float = key(5.0, "weight of the loss by which two draws of experts are to predict alike")


class ThorRouter(RandomRouter):
    """THOR (Zuo et al. 2021, arXiv 2110.04260, section 3): every token goes to K random experts, as by `random`.

    A training batch goes through the model with two draws. Its loss is theirs (eq. 4), halved so that it stays that of one
    prediction: (CE(p1) + CE(p2) + consistency * CR) / 2, where CR = (KL(p1 || p2) + KL(p2 || p1)) / 2 is summed over tokens
    (eq. 5). The engine makes the draws and the loss (`moedist.engine.forward`); a step costs two. In evaluation one draw is
    made, the same each time.
    """

    Options = ThorOptions
    draws = 2

    def check(self) -> None:
        if self.options.consistency < 0:
            raise ConfigError(f"router.options: consistency is {self.options.consistency:g}; give 0 or more, such as 5")

    def loss_weights(self) -> dict[str, float]:
        return {**super().loss_weights(), "consistency": self.options.consistency / 2}

    def most_rows_per_token(self) -> float:
        return float(self.draws * self.top_k)

    def expected_rows_per_token(self) -> float:
        return float(self.draws * self.top_k)
