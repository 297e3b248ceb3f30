"""One of two processes that train together; `torch.distributed.run` starts it."""

import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cases import Blocks, case_of, train_case
from timed import Plan, Stopwatch, learner_of

from unpaired_kd.networks.registry import weights_digest


class Together:
    "Trains the methods of a case and keeps what both processes must agree on."

    def __init__(self, case, plan):
        self.case = case
        self.plan = plan
        self.weights = {}
        self.took = {}

    def __call__(self, method):
        "Train one method."
        watch = Stopwatch(Blocks(self.case.size), self.plan.until)

        def tell(row):
            self.took[f"{self.case.name}, {row['stage']}"] = watch.seconds(self.plan.warm)

        with tempfile.TemporaryDirectory() as folder:  # `last.pt` is written by the first process
            learner = learner_of(method, watch, folder, self.plan, tell)
            learner.fit()
        self.processes = learner.accelerator.num_processes
        self.device = str(learner.device)
        for name, net in method.networks.items():
            self.weights[f"{type(method).__name__} {name}"] = weights_digest(net)


def main(folder, small):
    "Train, and leave a file with what came of it."
    plan = Plan("auto", "fp32", *((0, 1) if small else (3, 10)))
    found = dict(weights={}, seconds_per_step={})
    for method in ("lotus", "vpbsd"):
        run = Together(case_of(method, "recommended", small), plan)
        train_case(run.case, run)
        found["weights"] |= run.weights
        found["seconds_per_step"] |= run.took
    found |= dict(processes=run.processes, device=run.device)
    rank = torch.distributed.get_rank()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], "--small" in sys.argv)
