package stacks

import (
	"log/slog"
	"testing"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler)) // ErrorFunc logs every conflict
	etcdtest.Main(m)
}
