"""Flower's server app of the peer: rounds of federated averaging over all nodes, with the time at which each ended."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()
#: An app must name one; nodes are played by ``flower_nodes`` and never load it.
nobody = ClientApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the rounds; a line of the file of times for each, the first before any round."""
    settings = context.run_config
    nodes = int(settings["nodes"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)

    def tell(_number: int, _arrays: ArrayRecord) -> MetricRecord | None:
        with Path(str(settings["times"])).open("a") as file:
            file.write(f"{time.time()}\n")
        return None

    values = ArrayRecord([np.zeros(int(settings["numbers"]), np.float32)])
    strategy.start(grid, values, num_rounds=int(settings["rounds"]), evaluate_fn=tell)
