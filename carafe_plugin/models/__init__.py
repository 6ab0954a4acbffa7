"""Networks of our own on MMEngine, for tasks that no OpenMMLab toolbox of ours covers; imported only on request."""
