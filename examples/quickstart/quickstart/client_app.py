"""What each client runs."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional

from quickstart.data import client_data
from quickstart.model import Net

app = ClientApp()

# To defend what leaves the clients, these two lines in place of the one above:
# defend: from keyhole.fl import DefenseMod; from keyhole.defenses.gaussian_noise import GaussianNoise
# defend: app = ClientApp(mods=[DefenseMod(GaussianNoise(std=0.003), model=Net())])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the client's own images, in batches, by plain SGD."""
    model, config = Net(), message.content["config"]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    partition = int(context.node_config["partition-id"])
    images, labels = client_data(partition, int(context.node_config["num-partitions"]))
    most = int(context.run_config["images"])
    if most:
        images, labels = images[:most], labels[:most]

    # In a test run whose data may be seen, to score attacks on the transcript:
    # secrets: from keyhole.fl import record_batches
    # secrets: record_batches(context.run_config["secrets"], message, images, labels)

    optimizer = torch.optim.SGD(model.parameters(), lr=float(config["lr"]))
    total = 0.0
    for _ in range(int(config["local-epochs"])):
        for rows in torch.randperm(len(images)).split(int(config["batch-size"])):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
    metrics = MetricRecord({"num-examples": len(images), "loss": total / len(images) / int(config["local-epochs"])})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
