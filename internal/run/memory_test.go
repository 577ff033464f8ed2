package run

import "testing"

func TestMemoryIsGivenBackWhenQuiet(t *testing.T) {
	const live = 64 << 20
	var s spare
	for i, c := range []struct {
		allocated uint64
		due       bool
		why       string
	}{
		{100 << 20, false, "busy"},
		{101 << 20, true, "quiet after much"},
		{101 << 20, false, "nothing since"},
		{102 << 20, false, "little since"},
		{104 << 20, false, "little since"},
		{130 << 20, false, "busy again"},
		{160 << 20, false, "still"},
		{161 << 20, true, "quiet again"},
		{162 << 20, false, "little since"},
	} {
		if got := s.due(c.allocated, live); got != c.due {
			t.Errorf("look %d (%s): %t", i, c.why, got)
		}
	}
	s = spare{}
	if s.due(3<<20, 1<<20) || s.due(3<<20+100, 1<<20) {
		t.Error("a small process gives back what is not worth it")
	}
}
