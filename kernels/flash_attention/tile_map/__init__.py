"""What a mask shows, tile by tile: intervals, arrays with a predicate, lists of tiles."""
