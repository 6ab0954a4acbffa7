"""What CARAFE++ reassembles from where (:mod:`.reassembly`); parameters and FLOPs of a model (:mod:`.complexity`)."""

from .reassembly import Reassembly, Sources, chain_groups, check_chain, compose, record_reassemblies

__all__ = ["Reassembly", "Sources", "chain_groups", "check_chain", "compose", "record_reassemblies"]
