package hub

// Cursor is a place in the feed of one log. Everything up to the commit at After was passed, and of the commit behind that
// the first Skip events. Cursors of another log mean nothing in this one.
type Cursor struct {
	Log   string
	After Position
	Skip  uint32
}

// Fed is a commit as a reader of the feed gets it. Nobody changes the commit: readers share it.
type Fed struct {
	// Before is the place of the commit in front of it, whoever owns that, and At its own.
	Before, At Position
	// Skip is how many of its events the reader had before; it is less than their number.
	Skip   int
	Commit *Commit
}

// Cursor is the place behind the commit's event i.
func (f Fed) Cursor(log string, i int) Cursor {
	if i+1 >= len(f.Commit.Events) {
		return Cursor{Log: log, After: f.At} // it stays good when the commit itself is trimmed
	}
	return Cursor{Log: log, After: f.Before, Skip: uint32(i + 1)}
}
