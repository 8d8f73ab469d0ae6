package session

import (
	"testing"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

func TestMain(m *testing.M) { etcdtest.Main(m) }
