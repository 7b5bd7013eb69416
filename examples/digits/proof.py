"""What a run has trained on, in one line that two runs can be compared by."""

from __future__ import annotations

from hashlib import sha256


class Consumed:
    """A running hash of the samples used for training, in their order; saved and loaded like a model."""

    def __init__(self):
        self.count, self.digest = 0, ""

    def add(self, ids):
        for number in ids.tolist():
            self.digest = sha256(f"{self.digest} {number}".encode()).hexdigest()
        self.count += len(ids)

    def __str__(self):
        return f"consumed {self.count} samples, sha256 {self.digest}"

    def state_dict(self):
        return {"count": self.count, "digest": self.digest}

    def load_state_dict(self, state):
        self.count, self.digest = state["count"], state["digest"]
