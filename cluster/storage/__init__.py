"""What lies on disk beside the store: releases, training states, exports."""
