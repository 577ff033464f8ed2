package run

import (
	"testing"
	"time"
)

func TestMemoryIsGivenBackWhenQuiet(t *testing.T) {
	const live = 64 << 20
	var s spare
	start := time.Now()
	for i, c := range []struct {
		at        time.Duration
		allocated uint64
		due       bool
		why       string
	}{
		{5 * time.Second, 100 << 20, false, "busy"},
		{10 * time.Second, 101 << 20, true, "quiet after much"},
		{15 * time.Second, 101 << 20, false, "nothing since"},
		{20 * time.Second, 102 << 20, false, "little since"},
		{25 * time.Second, 104 << 20, false, "little since"},
		{30 * time.Second, 130 << 20, false, "busy again"},
		{35 * time.Second, 160 << 20, false, "still"},
		{40 * time.Second, 161 << 20, true, "quiet again"},
		{42 * time.Second, 180 << 20, false, "busy"},
		{44 * time.Second, 181 << 20, false, "quiet again, but it was done just now"},
		{48 * time.Second, 181 << 20, true, "8 s after it was done"},
	} {
		if got := s.due(start.Add(c.at), c.allocated, live); got != c.due {
			t.Errorf("look %d (%s): %t", i, c.why, got)
		}
	}
	s = spare{}
	if s.due(start, 3<<20, 1<<20) || s.due(start.Add(time.Minute), 3<<20+100, 1<<20) {
		t.Error("a small process gives back what is not worth it")
	}
}
