"""What MMDetection takes of panopticapi, for tests where that package, which no index has, is not installed."""
