package simulation

import (
	"math/rand/v2"
	"sync"
	"time"
)

// chance is where everything that is left to chance comes from.
type chance struct {
	mu sync.Mutex // guards r
	r  *rand.Rand
}

// newChance is one of several of a seed, so that what one draws does not depend on what others have drawn.
func newChance(seed uint64, of int) *chance {
	return &chance{r: rand.New(rand.NewPCG(seed, uint64(of)))}
}

// pick returns one of n.
func (c *chance) pick(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.r.IntN(n)
}

// one is true once in n times.
func (c *chance) one(n int) bool { return c.pick(n) == 0 }

func (c *chance) between(from, to time.Duration) time.Duration {
	return from + time.Duration(c.pick(int(to-from)))
}
