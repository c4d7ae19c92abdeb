"""How the ranks of a domain come to hold the same mask."""

from gradckpt_dist.agreement.collectives import Agreement, GroupAgreement, LocalAgreement, create_agreement
from gradckpt_dist.agreement.domain import Domain, domain_of
from gradckpt_dist.agreement.wire import Decision

__all__ = ["Agreement", "Decision", "Domain", "GroupAgreement", "LocalAgreement", "create_agreement", "domain_of"]
