package storetest_test

import (
	"testing"

	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestFeed(t *testing.T) {
	t.Parallel()
	storetest.RunPublished(t, func(*testing.T) store.PublishedFeed { return storetest.NewFeed() })
}
