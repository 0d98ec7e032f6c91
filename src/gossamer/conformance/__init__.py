"""What an optimizer must get right, whoever wrote it: facts that run on any `torch.optim.Optimizer`.

    pytest --pyargs gossamer.conformance --optimizer mypackage:MyOptimizer --optimizer-arg lr=0.01

or, in a test of one's own,

    assert not gossamer.conformance.check("mypackage:MyOptimizer", lr=0.01).failures

The optimizer is named by a string, because some facts are tried in processes of their own. `FACTS` lists all of them.
"""

from gossamer.conformance.kit import FACTS, check
from gossamer.conformance.ours import method
from gossamer.conformance.table import Table, Verdict, markdown

__all__ = ["FACTS", "Table", "Verdict", "check", "markdown", "method"]
