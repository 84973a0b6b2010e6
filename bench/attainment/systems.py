"""The systems that are compared, as flags of the same server."""

FIXED = ("--threshold-control", "fixed")
PLAIN = (*FIXED, "--shed", "off")
EDF = ("--scheduling", "edf", *FIXED, "--confidence-threshold", "0.8", "--batch-cap")
CAREFUL = ("--scheduling", "edf", *FIXED, "--batch-cap")
BEST_EFFORT = "dilaserve best effort"  # its requests say nothing of missed deadlines: they are answered late
SYSTEMS: dict[str, tuple[str, ...]] = {
    "fcfs .9": ("--scheduling", "fcfs", *PLAIN),
    "fcfs .8": ("--scheduling", "fcfs", *PLAIN, "--confidence-threshold", "0.8"),
    "fcfs .7": ("--scheduling", "fcfs", *PLAIN, "--confidence-threshold", "0.7"),
    "edf+shed .8": (*EDF, "2"),
    "edf+shed .9": (*CAREFUL, "2"),
    "dilaserve": (),
    BEST_EFFORT: (),
}
ABLATIONS: dict[str, tuple[str, ...]] = {
    "edf": ("--scheduling", "edf", *PLAIN),
    "least slack": ("--scheduling", "least-slack", *PLAIN),
    "thresholds only": ("--scheduling", "fcfs", "--shed", "off"),
    "composed only": ("--scheduling", "composed", *FIXED),
}


def singles(devices: str) -> tuple[str, str]:
    """The plan of everybody but this server, which plans for itself: every device on its own."""
    return "--plan", f"{len(devices.split(','))}x1"
