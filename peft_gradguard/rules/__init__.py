"""The rules of one allocator call: who is scored, who is ranked, what a broken loop is."""
