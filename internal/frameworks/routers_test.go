package frameworks

import (
	"fmt"
	"net/http"
	"path"

	"github.com/gin-gonic/gin"
	"github.com/go-chi/chi/v5"
	"github.com/gorilla/mux"
	"github.com/labstack/echo/v4"
)

// routes are the handlers of an application: work at POST /shop/items/7, and decoy wherever a part
// of that path leads to. They get the item's number.
type routes struct {
	work, decoy func(r *http.Request, id string) string
}

func (rt routes) std(f func(*http.Request, string) string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, f(r, r.PathValue("id")))
	})
}

// byPath is for handlers that see nothing of the router.
func (rt routes) byPath(f func(*http.Request, string) string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, f(r, path.Base(r.URL.Path)))
	})
}

func (rt routes) chi(f func(*http.Request, string) string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, f(r, chi.URLParam(r, "id")))
	}
}

func (rt routes) gin(f func(*http.Request, string) string) gin.HandlerFunc {
	return func(c *gin.Context) { c.String(http.StatusOK, "%s", f(c.Request, c.Param("id"))) }
}

func (rt routes) echo(f func(*http.Request, string) string) echo.HandlerFunc {
	return func(c echo.Context) error {
		return c.String(http.StatusOK, f(c.Request(), c.Param("id")))
	}
}

func (rt routes) mux(f func(*http.Request, string) string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, f(r, mux.Vars(r)["id"]))
	})
}

// plain is no middleware.
func plain(next http.Handler) http.Handler { return next }

// placement is a router and a place for a middleware in it.
type placement struct {
	name  string
	build func(mw middleware, rt routes) http.Handler
}

var placements = []placement{
	{"ServeMux/route", func(mw middleware, rt routes) http.Handler {
		m := http.NewServeMux()
		m.Handle("POST /shop/items/{id}", mw(rt.std(rt.work)))
		m.Handle("/", mw(rt.std(rt.decoy)))
		return m
	}},
	{"ServeMux/StripPrefix", func(mw middleware, rt routes) http.Handler {
		m, shop := http.NewServeMux(), http.NewServeMux()
		shop.Handle("POST /items/{id}", rt.std(rt.work))
		m.Handle("/shop/", mw(http.StripPrefix("/shop", shop)))
		m.Handle("/items/{id}", rt.std(rt.decoy))
		return m
	}},
	{"chi/Use", func(mw middleware, rt routes) http.Handler {
		m, shop := chi.NewRouter(), chi.NewRouter()
		m.Use(mw)
		shop.Post("/items/{id}", rt.chi(rt.work))
		m.Mount("/shop", shop)
		m.Post("/items/{id}", rt.chi(rt.decoy))
		return m
	}},
	{"chi/With", func(mw middleware, rt routes) http.Handler {
		m := chi.NewRouter()
		m.With(mw).Post("/shop/items/{id}", rt.chi(rt.work))
		m.Post("/items/{id}", rt.chi(rt.decoy))
		return m
	}},
	{"chi/With.Mount", func(mw middleware, rt routes) http.Handler {
		m, shop := chi.NewRouter(), chi.NewRouter()
		shop.Post("/items/{id}", rt.chi(rt.work))
		shop.Post("/{id}", rt.chi(rt.decoy))
		m.With(mw).Mount("/shop", shop)
		m.Post("/items/{id}", rt.chi(rt.decoy))
		return m
	}},
	{"chi/mounted.Use", func(mw middleware, rt routes) http.Handler {
		m, shop, items := chi.NewRouter(), chi.NewRouter(), chi.NewRouter()
		items.Post("/{id}", rt.chi(rt.work))
		shop.Use(mw)
		shop.Mount("/items", items)
		shop.Post("/{id}", rt.chi(rt.decoy))
		m.Mount("/shop", shop)
		return m
	}},
	{"chi/Route.Group", func(mw middleware, rt routes) http.Handler {
		m := chi.NewRouter()
		m.Route("/shop", func(shop chi.Router) {
			shop.Group(func(g chi.Router) {
				g.Use(mw)
				g.Route("/items", func(items chi.Router) { items.Post("/{id}", rt.chi(rt.work)) })
				g.Post("/{id}", rt.chi(rt.decoy))
			})
		})
		m.Post("/items/{id}", rt.chi(rt.decoy))
		return m
	}},
	{"gin/Use", func(mw middleware, rt routes) http.Handler {
		e := gin.New()
		e.Use(ginMiddleware(mw))
		e.Group("/shop").POST("/items/:id", rt.gin(rt.work))
		e.POST("/items/:id", rt.gin(rt.decoy))
		return e
	}},
	{"gin/Group", func(mw middleware, rt routes) http.Handler {
		e := gin.New()
		e.Group("/shop", ginMiddleware(mw)).POST("/items/:id", rt.gin(rt.work))
		e.POST("/items/:id", rt.gin(rt.decoy))
		return e
	}},
	{"gin/route", func(mw middleware, rt routes) http.Handler {
		e := gin.New()
		e.POST("/shop/items/:id", ginMiddleware(mw), rt.gin(rt.work))
		e.NoRoute(rt.gin(rt.decoy))
		return e
	}},
	{"gin/WrapH", func(mw middleware, rt routes) http.Handler {
		e := gin.New()
		e.POST("/shop/items/:id", gin.WrapH(mw(rt.byPath(rt.work))))
		e.NoRoute(rt.gin(rt.decoy))
		return e
	}},
	{"echo/Use", func(mw middleware, rt routes) http.Handler {
		e := echo.New()
		e.Use(echo.WrapMiddleware(mw))
		e.Group("/shop").POST("/items/:id", rt.echo(rt.work))
		e.POST("/items/:id", rt.echo(rt.decoy))
		return e
	}},
	{"echo/Pre", func(mw middleware, rt routes) http.Handler {
		e := echo.New()
		e.Pre(echo.WrapMiddleware(mw))
		e.POST("/shop/items/:id", rt.echo(rt.work))
		e.POST("/items/:id", rt.echo(rt.decoy))
		return e
	}},
	{"echo/Group", func(mw middleware, rt routes) http.Handler {
		e := echo.New()
		e.Group("/shop", echo.WrapMiddleware(mw)).POST("/items/:id", rt.echo(rt.work))
		e.POST("/items/:id", rt.echo(rt.decoy))
		return e
	}},
	{"echo/route", func(mw middleware, rt routes) http.Handler {
		e := echo.New()
		e.POST("/shop/items/:id", rt.echo(rt.work), echo.WrapMiddleware(mw))
		e.POST("/items/:id", rt.echo(rt.decoy))
		return e
	}},
	{"echo/WrapHandler", func(mw middleware, rt routes) http.Handler {
		e := echo.New()
		e.POST("/shop/items/:id", echo.WrapHandler(mw(rt.byPath(rt.work))))
		e.POST("/items/:id", rt.echo(rt.decoy))
		return e
	}},
	{"gorilla/Use", func(mw middleware, rt routes) http.Handler {
		m := mux.NewRouter()
		m.Use(mw)
		m.PathPrefix("/shop").Subrouter().Handle("/items/{id}", rt.mux(rt.work)).Methods("POST")
		m.Handle("/items/{id}", rt.mux(rt.decoy))
		return m
	}},
	{"gorilla/Subrouter.Use", func(mw middleware, rt routes) http.Handler {
		m := mux.NewRouter()
		shop := m.PathPrefix("/shop").Subrouter()
		shop.Use(mw)
		shop.Handle("/items/{id}", rt.mux(rt.work)).Methods("POST")
		m.Handle("/items/{id}", rt.mux(rt.decoy))
		return m
	}},
	{"gorilla/route", func(mw middleware, rt routes) http.Handler {
		m := mux.NewRouter()
		m.Handle("/shop/items/{id}", mw(rt.mux(rt.work))).Methods("POST")
		m.Handle("/items/{id}", rt.mux(rt.decoy))
		return m
	}},
}

// ginMiddleware makes a middleware of net/http one of gin, as adapters for it do: what comes after
// it writes to what the middleware has wrapped the response in. gin runs that only once.
func ginMiddleware(mw middleware) gin.HandlerFunc {
	return func(c *gin.Context) {
		before := c.Writer
		next := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			c.Request, c.Writer = r, &ginWriter{ResponseWriter: before, to: w}
			c.Next()
			c.Writer.WriteHeaderNow()
		})
		mw(next).ServeHTTP(before, c.Request)
		c.Writer = before
	}
}

// ginWriter is gin's writer around another one.
type ginWriter struct {
	gin.ResponseWriter
	to     http.ResponseWriter
	status int
	sent   bool
}

func (w *ginWriter) Unwrap() http.ResponseWriter { return w.to }
func (w *ginWriter) Header() http.Header         { return w.to.Header() }
func (w *ginWriter) Written() bool               { return w.sent }
func (w *ginWriter) WriteHeader(code int)        { w.status = code }

func (w *ginWriter) WriteHeaderNow() {
	if !w.sent && w.status != 0 {
		w.sent = true
		w.to.WriteHeader(w.status)
	}
}

func (w *ginWriter) Write(b []byte) (int, error) {
	w.WriteHeaderNow()
	return w.to.Write(b)
}

func (w *ginWriter) WriteString(s string) (int, error) { return w.Write([]byte(s)) }
