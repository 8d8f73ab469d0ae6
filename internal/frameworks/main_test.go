package frameworks

import (
	"testing"

	"github.com/gin-gonic/gin"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

func TestMain(m *testing.M) {
	gin.SetMode(gin.ReleaseMode)
	etcdtest.Main(m)
}
