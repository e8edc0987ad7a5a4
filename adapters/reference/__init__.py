"""The reference server: what a framework is measured against, small enough to be read in one sitting."""
