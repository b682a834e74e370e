"""What the server runs."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from quickstart.data import test_data
from quickstart.model import Net

app = ServerApp()


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Accuracy on the server's test images."""
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    images, labels = test_data()
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    return MetricRecord({"accuracy": float(right.float().mean())})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Federated averaging over all clients."""
    config = context.run_config
    torch.manual_seed(0)
    strategy = FedAvg(fraction_evaluate=0.0)

    # To record what the server sees:
    # record: from keyhole.fl import Recorder
    # record: strategy = Recorder(strategy, config["transcript"])

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=int(config["rounds"]),
        train_config=ConfigRecord({name: config[name] for name in ("lr", "local-epochs", "batch-size")}),
        evaluate_fn=evaluate,
    )
