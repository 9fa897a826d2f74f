"""How are the files of a saved folder called?

Transformers gives the first its name, PEFT the second; the others are ours. Masks: `mask_file.MASKS_FILE`.
"""

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
DESCRIPTION_FILE = "sparse_hf.json"
UNITS_FILE = "sparse_units.safetensors"
