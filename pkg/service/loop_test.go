package service_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/service"
)

func TestLoopEndsWhenStopped(t *testing.T) {
	begun := make(chan struct{})
	loop := service.NewLoop(func(ctx context.Context) error {
		close(begun)
		<-ctx.Done()
		return nil
	})
	ended := make(chan error, 1)
	go func() { ended <- loop.Run(t.Context()) }()
	<-begun
	require.NoError(t, loop.Stop(t.Context()))
	require.NoError(t, <-ended)
	require.NoError(t, loop.Stop(t.Context()), "a second stop does nothing")
}

func TestLoopStoppedBeforeRun(t *testing.T) {
	loop := service.NewLoop(func(context.Context) error {
		t.Error("ran")
		return nil
	})
	require.NoError(t, loop.Stop(t.Context()))
	require.NoError(t, loop.Run(t.Context()))
}
