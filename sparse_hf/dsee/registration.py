"""How PEFT learns of DSEE: the only file that reaches into PEFT's tables.

PEFT has no entry point for methods of others: `register_peft_method` refuses a name that is not a member of its
enumeration of methods. So a member is added first. It must be a real one, since Transformers reads its `.value`.
"""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method


# Neither PEFT's own nor another plugin's: plain "dsee" might be taken one day.
METHOD = "sparse_hf_dsee"


def dsee_type() -> PeftType:
    """PEFT's name of the method, added to its enumeration on the first call."""
    name = METHOD.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_, member.__objclass__ = name, name, PeftType
        member._sort_order_ = len(PeftType._member_names_)
        type.__setattr__(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType.__members__[name]


def register_dsee() -> None:
    """Let PEFT make, save and load DSEE adapters. Calling it again changes nothing."""
    # Here, since a config needs the name; and first, so that an older PEFT without what they use is left as it was.
    from sparse_hf.dsee.config import DseeConfig
    from sparse_hf.dsee.model import DseeModel

    if dsee_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=METHOD, config_cls=DseeConfig, model_cls=DseeModel)
